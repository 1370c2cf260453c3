"""A layer is solved by itself: which weights stay, and what the ones that stay become."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Optional

import torch

from ..selection.granularity import NMGranularity
from ..solvers.admm import admm
from ..solvers.pattern import Pattern
from ..solvers.sparsegpt import sparsegpt
from ..solvers.swaps import improve_mask
from .topk import TopKOnce


@dataclass(frozen=True)
class Refined(TopKOnce):
    """Top-k of each row or group, whose mask is improved by swaps as long as the loss of the output falls."""

    @property
    def label(self) -> str:  # type: ignore[override]
        """In words."""
        return super().label + ", improved by swaps"

    def choose(self, layer: Any, name: str) -> torch.Tensor:
        """Bool, shape (out, in)."""
        pattern, gram = _pattern(self, layer, name), layer.host[name].seen
        mask = super().choose(layer, name)
        groups = pattern if isinstance(pattern, tuple) else None
        return improve_mask(_weight(layer, name, gram), mask.to(gram.device), gram, groups=groups).to(mask.device)


@dataclass(frozen=True)
class Solved(TopKOnce):
    """Mask and values together, by a solver of the layer's least squares problem.

    Args:
        solver (`str`): `"sparsegpt"` or `"admm"`.
        damping (`float`): share of the mean diagonal that is added to the Gram matrix.
        block_size (`int`): columns that share a threshold in `"sparsegpt"`.
    """

    solver: str = "admm"
    damping: float = 0.01
    block_size: int = 128

    @property
    def label(self) -> str:  # type: ignore[override]
        """In words."""
        if self.solver == "sparsegpt" and ":" not in self.granularity:
            return super().label.replace("the row", "a block of columns")
        return super().label

    def solve(self, layer: Any, name: str) -> tuple[torch.Tensor, Optional[torch.Tensor]]:
        """Mask (bool) and values (float32) of a layer, both of shape (out, in)."""
        gram, pattern = layer.host[name].seen, _pattern(self, layer, name)
        weight = _weight(layer, name, gram)
        if self.solver == "admm":
            mask, values = admm(weight, gram, pattern, self.damping)
        else:
            mask, values = sparsegpt(weight, gram, pattern, self.damping, self.block_size)
        return mask.to(layer.weight.device), values.float().to(layer.weight.device)


def _pattern(rule: TopKOnce, layer: Any, name: str) -> Pattern:
    """What solvers are asked for: a sparsity, or (n, m)."""
    granularity = layer.host[name].granularity
    if isinstance(granularity, NMGranularity):
        return granularity.n, granularity.m
    return 1.0 - rule.density(layer, name)


def _weight(layer: Any, name: str, gram: torch.Tensor) -> torch.Tensor:
    """The weight as it is now, trained and pruned in part perhaps, where the Gram matrix is."""
    return layer.under_mask(name, layer.matrix.detach()).detach().to(gram)
