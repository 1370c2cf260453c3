"""Kept weights are rewritten at calibration, so that the layer's output changes least."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Optional

import torch

from ..layers.sharding import agreed
from ..solvers.units import repair
from ..storage.codec import describe_values
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
        """Set new values, rounded as they will be stored."""
        matrix = layer.matrix if values is None else values
        # on the CPU, where it takes no room on a device that holds one block at a time
        layer.host[name].rewritten = self.encode(layer, matrix, layer.get_mask(name)).cpu()
        layer.cached_weight.clear()

    def inside(self, layer: Any, name: str, matrix: torch.Tensor) -> torch.Tensor:
        """The new values, from when they were found."""
        stored = layer.host[name].rewritten
        if stored is not None:
            return decode_values(stored, layer.get_mask(name), self.value_dtype).to(matrix.dtype)
        return super().inside(layer, name, matrix)

    def changes_weights(self, layer: Any, name: str) -> bool:
        """Whether values were rewritten."""
        return name in layer.held("values") or layer.host[name].rewritten is not None

    def final(self, layer: Any, name: str, mask: torch.Tensor) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
        """The values as they were found."""
        stored = layer.host[name].rewritten
        if stored is None:
            return super().final(layer, name, mask)
        return {"values": describe_values(stored, self.value_dtype)}, {"values": stored}


@dataclass(frozen=True)
class Repair(Rewrite):
    """Columns that stay make up for those that are removed, by least squares on the inputs behind pruned layers.

    A matrix that loses no column stays as it is, and nothing is stored of it.

    Args:
        damping (`float`): how far new values are drawn to the old ones, as a share of the mean squared input.
    """

    damping: float = 0.01

    label = "rewritten by least squares"
    fits = True

    def settle(self, layer: Any, name: str, values: Optional[torch.Tensor]) -> None:
        """Find new values for the columns that the mask keeps."""
        columns = layer.get_mask(name)[0]
        if not bool(columns.all()):
            found = repair(layer.matrix.detach(), layer.host[name].seen, columns, self.damping)
            super().settle(layer, name, agreed(found.cpu()).to(layer.weight.device))

    def final(self, layer: Any, name: str, mask: torch.Tensor) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
        """The new values in their stored form, if there are any."""
        return super().final(layer, name, mask) if self.changes_weights(layer, name) else ({}, {})
