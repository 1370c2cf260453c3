"""What quantises a weight, and what the weight stands for."""

from __future__ import annotations

from typing import Any, Optional, cast

import torch
from peft.utils.integrations import dequantize_module_weight
from torch import nn


# what PEFT can dequantise, and what is tested here
SUPPORTED = ("bitsandbytes 4-bit", "bitsandbytes 8-bit", "torchao")


def quantization_of(module: nn.Module) -> Optional[str]:
    """What has quantised the weight of a module, such as `"torchao"`; `None` if it is not quantised.

    It is told by names, so that no library of these has to be installed.
    """
    weight = getattr(module, "weight", None)
    kinds = {"Params4bit": "bitsandbytes 4-bit", "Int8Params": "bitsandbytes 8-bit"}
    if type(weight).__name__ in kinds:
        return kinds[type(weight).__name__]
    if type(weight).__module__.startswith("torchao."):
        return "torchao"
    if hasattr(module, "W_q"):
        return "HQQ"
    if type(weight).__module__.startswith("optimum.quanto") or type(module).__module__.startswith("optimum.quanto"):
        return "quanto"
    if hasattr(module, "qweight"):
        return f"{type(module).__name__} (GPTQ, AWQ)"
    if isinstance(weight, torch.Tensor) and (not weight.is_floating_point() or weight.element_size() == 1):
        return str(weight.dtype)
    return None


def dequantized_weight(module: nn.Module) -> torch.Tensor:
    """The weight of a module in floating point; as it is if it is not quantised."""
    _put_back_in_order(module)
    before = module.weight
    weight = cast(torch.Tensor, dequantize_module_weight(module))
    if module.weight is not before:
        # PEFT puts a copy of weights of bitsandbytes on a CPU in their place, with which the layer cannot compute
        module.weight = before
    return weight


def _put_back_in_order(module: nn.Module) -> None:
    """Undo what bitsandbytes does to a 4-bit layer that runs in eval mode on a CPU with AVX512-BF16.

    Its numbers are in another order from then on, which is not that of dequantisation. To be saved, it puts them back,
    but for the scales of the blocks, of which it keeps a column for each row.
    """
    state: Any = getattr(module.weight, "quant_state", None)
    if not getattr(state, "packing_format_for_cpu", False):
        return
    module.state_dict()
    if state.absmax.dim() == 2:
        state.absmax = state.absmax.T.reshape(-1).float()
