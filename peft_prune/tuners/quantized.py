"""Quantised base weights: a mask is applied to what they stand for.

In each forward pass the weight of a layer is dequantised, masked and used, as PEFT does to merge a LoRA. In inference it
takes the memory of one such matrix at a time, and the time of dequantising it; in training autograd keeps it until the
backward pass, unless gradient checkpointing is on.
"""

from __future__ import annotations

from typing import Any, Optional, cast

import torch
import torch.nn.functional as F
from peft.utils.integrations import dequantize_module_weight
from torch import nn

from .layer import PruningLayer


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


class PrunedQuantizedLinear(PruningLayer):
    """A linear layer with a quantised weight, seen through a mask."""

    quantized = True

    @property
    def weight(self) -> torch.Tensor:
        """The dequantised weight: floating point, shape (out, in). Made anew at each access."""
        return dequantize_module_weight(self.get_base_layer()).detach()

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in) of the pruned matrix."""
        base = cast(Any, self.get_base_layer())
        return base.out_features, base.in_features

    def _check_weight(self) -> None:
        self._warn_about_hooks()

    def _apply_adapters(self, x: torch.Tensor) -> torch.Tensor:
        # nothing is cached: masked weights of floating point would undo what quantisation saves
        return self._apply_weight(x, self.effective_weight(self.weight))

    def _apply_weight(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        bias = self.bias
        return F.linear(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype))

    def merge(self, safe_merge: bool = False, adapter_names: Optional[list[str]] = None) -> None:
        """Not possible: what is merged would have to be quantised again.

        Raises:
            ValueError: always; the message says what to do instead.
        """
        raise ValueError(
            f"{self.module_name!r} is quantised ({quantization_of(self.get_base_layer())}), and adapters cannot be "
            "merged into quantised weights. Save the adapter, load the base model without quantization_config, then "
            "PeftModel.from_pretrained(base, folder).merge_and_unload()."
        )
