"""How many heads and neurons have to go for a budget, and which: of each kind (P-pruning, section 3.3), or of all."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Optional

import numpy as np
import torch

from .shapes import FREE, Shapes
from .sites import HEADS, Site


@dataclass(frozen=True)
class Plan:
    """The order in which the units of a site go.

    Attributes:
        site ([`Site`]): the site.
        cost (`int`): what one of its units costs, in multiply-adds or parameters.
        heights (`np.ndarray`): ascending, one for each unit that may go: comparable between sites.
        order (`np.ndarray`): int64, the same shape: the unit that goes at each height.
    """

    site: Site
    cost: int
    heights: np.ndarray
    order: np.ndarray


def choose_units(
    plans: Sequence[Plan],
    keep_ratio: float,
    lambda_ffn: Optional[float],
    what: str = "FLOPs",
    removed: int = 0,
    shapes: Shapes = FREE,
) -> dict[str, torch.Tensor]:
    """Choose the units that stay: those below one height go, the lowest height that meets the budget.

    With λ, what has to go is shared out between heads and neurons as 1 : λ, and there is one height for all heads and
    one for all neurons; what one kind cannot give, the other gives. Without, heads and neurons are in one list.

    Args:
        plans (`Sequence[Plan]`): a plan for each site.
        keep_ratio (`float`): share of the cost that stays, of these sites and of what was removed before.
        lambda_ffn (`float`, *optional*): λ, how much more is taken from neurons than from heads.
        what (`str`): what costs are counted in, for the error.
        removed (`int`): cost of what was removed before.
        shapes ([`Shapes`]): whether layers may keep different numbers of units.

    Returns:
        `dict[str, torch.Tensor]`: for each site by the name of its output the units that stay: int64, ascending. Their
        cost is at most a step above or below the budget: a unit, or as many as [`Shapes`] says.

    Raises:
        ValueError: so few units cannot be reached.
    """
    total = removed + sum(plan.cost * plan.site.units for plan in plans)
    kinds: list[list[Plan]] = [list(plans)]
    if lambda_ffn is not None:
        kinds = [[p for p in plans if p.site.kind == HEADS], [p for p in plans if p.site.kind != HEADS]]
    most = [sum(p.cost * sum(shapes.steps(p)) for p in kind) for kind in kinds]
    wanted = max(0.0, (1.0 - keep_ratio) * total - removed)
    if wanted > sum(most) + 0.5:
        raise ValueError(
            f"keep_ratio={keep_ratio!r} cannot be reached: with the units that every layer keeps, "
            f"{1 - (sum(most) + removed) / total:.4f} of the {what} remain. Use a larger keep_ratio, or a smaller "
            "min_share or multiple_of where it is set."
        )
    goals = [wanted]
    if lambda_ffn is not None:
        goals = [wanted / (1 + lambda_ffn), wanted * lambda_ffn / (1 + lambda_ffn)]
        for one, other in ((0, 1), (1, 0)):
            excess = max(0.0, goals[one] - most[one])
            goals[one] -= excess
            goals[other] += excess
    plans = [plan for kind in kinds for plan in kind]
    gone = [count for kind, goal in zip(kinds, goals, strict=True) for count in _cut(kind, goal, shapes)]
    if shapes.kind == "uniform":
        gone = shapes.made_uniform(plans, gone, wanted)
    kept = {}
    for plan, count in zip(plans, gone, strict=True):
        stays = np.setdiff1d(np.arange(plan.site.units), plan.order[:count])
        kept[plan.site.output] = torch.from_numpy(stays)
    return kept


def _cut(plans: Sequence[Plan], goal: float, shapes: Shapes) -> list[int]:
    """How many units each site loses when units go by height until their cost reaches the goal.

    Near the end, a step that would miss the goal by more than the smallest steps stays, and smaller ones go instead.
    """
    gone = [0] * len(plans)
    steps = sorted(step for i, plan in enumerate(plans) for step in _steps(i, plan, shapes))
    smallest = min((count * plans[i].cost for _, i, count in steps), default=0)
    removed = 0
    for most in (goal + smallest, math.inf):
        passed_over = []
        for step in steps:
            _, i, count = step
            cost = count * plans[i].cost
            if removed >= math.floor(goal):  # a goal is a float
                return gone
            if removed + cost > most:
                passed_over.append(step)
                continue
            removed += cost
            gone[i] += count
        steps = passed_over
    return gone


def _steps(i: int, plan: Plan, shapes: Shapes) -> list[tuple[float, int, int]]:
    """Height, number of the site, and units of each step."""
    counts = shapes.steps(plan)
    return [(float(plan.heights[end - 1]), i, n) for n, end in zip(counts, accumulate(counts), strict=True)]
