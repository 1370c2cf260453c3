"""The layer of P-pruning: the shared one, which before calibration may have a random choice of heads or neurons."""

from __future__ import annotations

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from ...masks.bits import pack_bits
from ..layer import PruningLayer
from ..linear import LAYER_CLASSES, PrunedLinear, PrunedLinearConv1D


class PPruningLayer(PruningLayer):
    """Of an adapter with `init_weights=False` that is not calibrated, a layer holds `bits`, and no `progress`."""

    def draw_columns(self, name: str, units: torch.Tensor, keep_ratio: float) -> None:
        """Keep a random choice of units, at least one, and if there are two, not all.

        Args:
            name (`str`): the adapter.
            units (`torch.Tensor`): int64, shape (units, columns a unit).
            keep_ratio (`float`): share of the units that stays.
        """
        count = max(1, min(round(keep_ratio * len(units)), len(units) - 1))
        columns = torch.zeros(self.shape[1], dtype=torch.bool)
        columns[units[torch.randperm(len(units))[:count]].flatten()] = True
        self.held("bits")[name] = pack_bits(columns.expand(self.shape)).to(self.weight.device)


class PPruningLinear(PPruningLayer, PrunedLinear):
    """`nn.Linear` under P-pruning."""


class PPruningConv1D(PPruningLayer, PrunedLinearConv1D):
    """Transformers' `Conv1D` under P-pruning."""


PPRUNING_LAYERS: dict[type[nn.Module], type[PruningLayer]] = {
    **LAYER_CLASSES,
    nn.Linear: PPruningLinear,
    Conv1D: PPruningConv1D,
}
