"""Scores that are learned, one for each unit (movement pruning, Sanh et al. 2020; SMP, Jiang et al. 2023)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Optional

import torch
from torch import nn

from .base import Importance
from .start import initial_scores
from .straight_through import MaskedWeight


@dataclass(frozen=True)
class Learned(Importance):
    """A trained score for each unit, with a gradient straight through the selection.

    Args:
        start (`str` or `float`): where scores start, see [`initial_scores`].
    """

    start: str | float = "zeros"

    label = "learned score"
    tensors: ClassVar[tuple[str, ...]] = ("scores",)
    needs_weights = False

    def add(self, layer: Any, name: str) -> None:
        """Scores: float32, shape (out / rows, in / columns)."""
        layer.held("scores")[name] = nn.Parameter(initial_scores(layer.matrix, self.start, layer.block(name)))

    def rank(self, layer: Any, name: str) -> torch.Tensor:
        """The scores."""
        scores = layer.held("scores")[name]
        return scores.detach().clone() if layer.is_whole else scores  # what was gathered is gone soon

    def scores(self, layer: Any, name: str) -> tuple[Optional[torch.Tensor], Optional[torch.Tensor]]:
        """The scores, and the factor of their penalty."""
        scores = layer.held("scores")[name]
        return scores, layer.take_penalty(name, scores)

    def masked(self, layer: Any, name: str, matrix: torch.Tensor) -> torch.Tensor:
        """`W ⊙ M`, through which scores receive `∂L/∂Ŵ ⊙ W`."""
        scores, penalty = self.scores(layer, name)
        return MaskedWeight.apply(scores, matrix, layer.get_mask(name), penalty, layer.block(name))
