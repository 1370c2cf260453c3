"""Units stay whose score is above a threshold, which may be moved so that a sparsity comes out."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Optional

from ..layers.sharding import gathered
from ..selection.allocation import allocate_globally
from ..selection.curve import Schedule
from ..selection.device import on_cpu
from .base import Count, Rule


DEFAULT_SPARSITY = 0.5


@dataclass(frozen=True)
class Threshold(Rule):
    """Units with `sigmoid(S)` above a threshold that rises on a schedule, or with a score above a fixed number.

    Args:
        schedule ([`Schedule`], *optional*): of the threshold of `sigmoid(S)`.
        score (`float`): the fixed threshold of the score, without a schedule.
        min_density (`float`): share of each matrix that stays in any case.
        moves (`bool`): the threshold is where the config's sparsity, on its schedule, wants it: that share of the
            scores of all matrices is below it.
    """

    schedule: Optional[Schedule] = None
    score: float = 0.0
    min_density: float = 0.0
    moves: bool = False

    label = "scores above a threshold"
    expects_removal = True

    @property
    def finds_sparsity(self) -> bool:  # type: ignore[override]
        """Whether the penalty decides how much is removed, and no sparsity was asked for."""
        return not self.moves

    def why_missed(self) -> str:
        """The least share of each matrix."""
        return (
            f"min_density={self.min_density:g} keeps that share of each matrix, whatever its scores. Lower it, or ask "
            "for what can be reached"
        )

    def at_first(self, layer: Any, name: str) -> int:
        """By the initial sparsity; half of the weights if the adapter starts at random, for tests."""
        config = layer.config(name)
        sparsity = config.initial_sparsity if config.init_weights else (config.sparsity or DEFAULT_SPARSITY)
        return layer.host[name].granularity.count(1.0 - sparsity, layer.shape)

    def counts(self, name: str, layers: list[Any], step: int, total_steps: int) -> Sequence[Optional[Count]]:
        """How many scores are above the threshold of a step."""
        if self.moves:
            return self._above_moved(name, layers, _scheduled(name, layers, step, total_steps))
        threshold = self.at(step, total_steps)
        return [self._above(layer, name, threshold) for layer in gathered(layers)]

    def at(self, step: int, total_steps: int) -> float:
        """Threshold of the scores at a step."""
        if self.schedule is None:
            return self.score
        tau = self.schedule.at(step, total_steps)
        return math.log(tau / (1 - tau)) if tau > 0 else -math.inf

    def _above_moved(self, name: str, layers: list[Any], sparsity: float) -> Sequence[Count]:
        """How many scores of each matrix are among the largest of all, or `min_density` of them."""
        rankings = [layer.ranking(name) for layer in gathered(layers)]
        counts = allocate_globally(rankings, 1.0 - sparsity)
        units = [
            count.clamp(min=math.ceil(self.min_density * scores.numel()))
            for count, scores in zip(counts.unbind(), rankings, strict=True)
        ]
        read = [int(count) for count in units] if on_cpu(counts) else units
        return [count * math.prod(layer.block(name)) for count, layer in zip(read, layers, strict=True)]

    def _above(self, layer: Any, name: str, threshold: float) -> Count:
        scores = layer.ranking(name)
        units = (scores > threshold).sum().clamp(min=math.ceil(self.min_density * scores.numel()))
        return (int(units) if on_cpu(units) else units) * math.prod(layer.block(name))


def _scheduled(name: str, layers: list[Any], step: int, total_steps: int) -> float:
    config = layers[0].config(name)
    return float(config.sparsity_schedule_for(config.sparsity).at(step, total_steps))
