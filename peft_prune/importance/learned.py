"""Scores that are learned, one for each unit (movement pruning, Sanh et al. 2020; SMP, Jiang et al. 2023)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Optional

import torch
from torch import nn

from .base import Importance
from .calibrated_start import CALIBRATED_STARTS, CalibratedStart, calibrated_scores
from .start import initial_scores
from .straight_through import MaskedWeight


@dataclass(frozen=True)
class Learned(Importance):
    """A trained score for each unit, with a gradient straight through the selection.

    Args:
        start (`str` or `float`): where scores start, see [`initial_scores`] and [`CALIBRATED_STARTS`].
    """

    start: str | float = "zeros"

    label = "learned score"
    tensors: ClassVar[tuple[str, ...]] = ("scores",)
    needs_weights = False

    @property
    def calibrated_start(self) -> Optional[CalibratedStart]:
        """Where scores start, if that has to be calibrated."""
        return CALIBRATED_STARTS.get(self.start) if isinstance(self.start, str) else None

    def add(self, layer: Any, name: str) -> None:
        """Scores: float32, shape (out / rows, in / columns); zeros until a calibrated start is known.

        Raises:
            ValueError: the start looks at inputs, and those of the layer are not the columns of its matrix.
        """
        self.check_inputs(layer)
        start = "zeros" if self.calibrated_start else self.start
        layer.held("scores")[name] = nn.Parameter(initial_scores(layer.matrix, start, layer.block(name)))

    def check_inputs(self, layer: Any) -> None:
        """Raise `ValueError` if a start that looks at inputs makes no sense for a layer."""
        if self.calibrated_start and not layer.columns_are_inputs:
            raise ValueError(
                f"score_init={self.start!r} needs the inputs of linear layers, but {layer.module_name!r} is not "
                "linear. Remove it from target_modules, or use score_init='magnitude'."
            )

    def begin(self, layer: Any, name: str, factors: torch.Tensor) -> None:
        """Fill the scores."""
        with torch.no_grad():
            scores = layer.held("scores")[name]
            scores.copy_(calibrated_scores(layer.matrix, factors, layer.block(name)))

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
