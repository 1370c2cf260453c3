"""The layer of P-pruning: the shared one, which before calibration may have a random choice of heads or neurons."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from ..layer import PruningLayer
from ..linear import LAYER_CLASSES, PrunedLinear, PrunedLinearConv1D


class PPruningLayer(PruningLayer):
    """Of an adapter with `init_weights=False` that is not calibrated, a layer holds `columns` (uint8, shape (in,))."""

    stored_names = (*PruningLayer.stored_names, "columns")

    def draw_columns(self, name: str, units: torch.Tensor, keep_ratio: float) -> None:
        """Keep a random choice of units, at least one, and if there are two, not all.

        Args:
            name (`str`): the adapter.
            units (`torch.Tensor`): int64, shape (units, columns a unit).
            keep_ratio (`float`): share of the units that stays.
        """
        count = max(1, min(round(keep_ratio * len(units)), len(units) - 1))
        columns = torch.zeros(self.shape[1], dtype=torch.uint8)
        columns[units[torch.randperm(len(units))[:count]].flatten()] = 1
        self.held("columns")[name] = columns.to(self.weight.device)

    def set_mask(self, adapter_name: str, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Give an adapter its final mask, as for every method; the random choice is dropped."""
        info = super().set_mask(adapter_name, *args, **kwargs)
        if adapter_name in self.held("columns"):
            del self.held("columns")[adapter_name]
        return info

    def kept(self, adapter_name: str) -> int:
        """Number of weights that the adapter keeps at present."""
        if adapter_name in self.held("columns"):
            return int(self.held("columns")[adapter_name].sum()) * self.shape[0]
        return super().kept(adapter_name)

    def _mask_sources(self, adapter_name: str) -> tuple[torch.Tensor, ...]:
        if adapter_name in self.held("columns"):
            return (self.held("columns")[adapter_name],)
        return super()._mask_sources(adapter_name)

    def _compute_mask(self, adapter_name: str) -> torch.Tensor:
        if adapter_name in self.held("columns"):
            return self.held("columns")[adapter_name].bool().expand(self.shape)
        return super()._compute_mask(adapter_name)


class PPruningLinear(PPruningLayer, PrunedLinear):
    """`nn.Linear` under P-pruning."""


class PPruningConv1D(PPruningLayer, PrunedLinearConv1D):
    """Transformers' `Conv1D` under P-pruning."""


PPRUNING_LAYERS: dict[type[nn.Module], type[PruningLayer]] = {
    **LAYER_CLASSES,
    nn.Linear: PPruningLinear,
    Conv1D: PPruningConv1D,
}
