"""An update of every weight that stays: fine-tuning under a mask."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Optional

import torch
from torch import nn

from .stored_values import StoredValues


@dataclass(frozen=True)
class Dense(StoredValues):
    """`(W + U) ⊙ M`. In the end the kept values are stored, and `U` is dropped.

    Args:
        value_dtype (`str`): how kept values are stored, see [`encode_values`].
        random (`bool`): start at random instead of at 0, for tests.
    """

    random: bool = False

    label = "dense"
    tensors = ("update",)
    watched = ("update",)
    trains_under_mask = True

    def add_trained(self, layer: Any, name: str) -> None:
        """`update`: float32, shape (out, in)."""
        matrix = layer.matrix
        update = torch.zeros(matrix.shape, dtype=torch.float32, device=matrix.device)
        if self.random:
            update.normal_(0, float(matrix.detach().abs().mean()))
        layer.held("update")[name] = nn.Parameter(update)

    def addend(self, layer: Any, name: str) -> Optional[torch.Tensor]:
        """`U`, as long as it is trained."""
        held = layer.held("update")
        return held[name] if name in held and name in layer.progress else None

    def settle(self, layer: Any, name: str, values: Optional[torch.Tensor]) -> None:
        """Train on from new values of the weights that stay."""
        if values is not None and name in layer.held("update"):
            update = layer.held("update")[name]
            with torch.no_grad():
                update.copy_(torch.where(layer.get_mask(name), values - layer.matrix.detach().float(), update))

    def delta(self, layer: Any, name: str) -> torch.Tensor:
        """`U`; of a final adapter the difference of the kept values from the base weight."""
        addend = self.addend(layer, name)
        return super().delta(layer, name) if addend is None else addend
