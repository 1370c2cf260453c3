"""Kept weights are rewritten at calibration, so that the layer's output changes least."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Optional

import torch

from ..storage.values import decode_values
from .stored_values import StoredValues


@dataclass(frozen=True)
class Rewrite(StoredValues):
    """New values for the weights that stay, found with the mask. They are stored; nothing is trained.

    Args:
        value_dtype (`str`): how kept values are stored. They are rounded to it at once, so that the blocks behind see
            the values that will be loaded.
    """

    label = "rewritten"

    def settle(self, layer: Any, name: str, values: Optional[torch.Tensor]) -> None:
        """Put new values in force, rounded as they will be stored."""
        mask = layer.get_mask(name)
        stored = self.encode(layer, layer.matrix if values is None else values, mask)
        layer.host[name].values = decode_values(stored, mask, self.value_dtype)
        layer.cached_weight.clear()

    def inside(self, layer: Any, name: str, matrix: torch.Tensor) -> torch.Tensor:
        """The new values, from when they were found."""
        values = layer.host[name].values
        if name not in layer.held("values") and values is not None:
            return values.to(matrix.dtype)
        return super().inside(layer, name, matrix)

    def changes_weights(self, layer: Any, name: str) -> bool:
        """Whether values were rewritten."""
        return name in layer.held("values") or layer.host[name].values is not None
