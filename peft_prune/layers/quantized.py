"""Quantised base weights: a mask is applied to what they stand for.

In each forward pass the weight of a layer is dequantised, masked and used, as PEFT does to merge a LoRA. In inference
it takes the memory of one such matrix at a time, and the time of dequantising it; in training autograd keeps it until
the backward pass, unless gradient checkpointing is on.
"""

from __future__ import annotations

from typing import Any, Optional, cast

import torch
import torch.nn.functional as F

from ..quantization import dequantized_weight, quantization_of
from .layer import PruningLayer


class PrunedQuantizedLinear(PruningLayer):
    """A linear layer with a quantised weight, seen through a mask."""

    quantized = True
    columns_are_inputs = True

    @property
    def weight(self) -> torch.Tensor:
        """The dequantised weight: floating point, shape (out, in). Recomputed at each access."""
        return dequantized_weight(self.get_base_layer()).detach()

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in) of the pruned matrix."""
        base = cast(Any, self.get_base_layer())
        return base.out_features, base.in_features

    def _check_weight(self) -> None:
        self._warn_about_hooks()

    def _apply_masked(self, x: torch.Tensor) -> torch.Tensor:
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
