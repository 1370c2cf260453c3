"""How a value moves from its start to its end over training."""

from __future__ import annotations

import math
from dataclasses import dataclass


# Each curve runs from 0 to 1 as progress does.
CURVES = {
    "cubic": lambda progress: 1.0 - (1.0 - progress) ** 3,  # Zhu & Gupta 2017, eq. 1
    "linear": lambda progress: progress,
    "constant": lambda progress: 1.0,
}


@dataclass(frozen=True)
class Schedule:
    """A value that goes from `initial` to `final` between two shares of training and rests outside them.

    Args:
        initial (`float`): value up to `start`.
        final (`float`): value from `end` on.
        start (`float`): share of training, from 0 to 1, at which the change begins.
        end (`float`): share of training at which it is complete.
        curve (`str`): `"cubic"` (fast at first), `"linear"`, or `"constant"` (`final` from `start` on).
    """

    initial: float
    final: float
    start: float = 0.0
    end: float = 1.0
    curve: str = "cubic"

    def at(self, step: int, total_steps: int) -> float:
        """Value for the optimizer step number `step` (0 is the first) of `total_steps`."""
        progress = step / total_steps
        if progress < self.start:
            return self.initial
        if progress >= self.end or self.curve == "constant":
            return self.final
        share = CURVES[self.curve]((progress - self.start) / (self.end - self.start))
        return self.initial + (self.final - self.initial) * share

    def stages(self, total_steps: int, number: int) -> dict[int, float]:
        """Optimizer steps at which the value is brought up to date, where that is done a few times only.

        Args:
            total_steps (`int`): of the training.
            number (`int`): how often, at most and evenly spaced; a constant curve has one stage, at its start.

        Returns:
            `dict[int, float]`: value by step, in order; the last is `final`.
        """
        first = last = step_at(self.start, total_steps)
        if self.curve != "constant":
            last = step_at(self.end, total_steps)
        number = min(number, last - first)
        steps = (first + math.ceil(stage * (last - first) / number) for stage in range(1, number))
        return {step: self.at(step, total_steps) for step in steps} | {last: self.final}


def step_at(share: float, total_steps: int) -> int:
    """The first optimizer step at which a share of training is done."""
    return math.ceil(round(share * total_steps, 6))  # 0.55 of 100 is 55, not the next above 55.000…01
