"""How many heads and neurons have to go for a budget, and which (P-pruning, Wang et al. 2024, section 3.3)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from .sites import HEADS, Site


@dataclass(frozen=True)
class Plan:
    """The order in which the units of a site go.

    Attributes:
        site ([`Site`]): the site.
        cost (`int`): multiply-adds of one of its units.
        heights (`np.ndarray`): ascending, shape (units - 1,): comparable between sites of a kind.
        order (`np.ndarray`): int64, shape (units - 1,): the unit that goes at each height.
    """

    site: Site
    cost: int
    heights: np.ndarray
    order: np.ndarray


def choose_units(plans: Sequence[Plan], keep_ratio: float, lambda_ffn: float) -> dict[str, torch.Tensor]:
    """Choose the units that stay: at one height for all heads and one for all neurons, the lowest that will do.

    What has to go is shared out between heads and neurons as 1 : λ. What one kind cannot give, since each site keeps a
    unit, the other gives.

    Args:
        plans (`Sequence[Plan]`): a plan for each site.
        keep_ratio (`float`): share of the multiply-adds of these sites that stays.
        lambda_ffn (`float`): λ, how much more is taken from neurons than from heads.

    Returns:
        `dict[str, torch.Tensor]`: for each site by the name of its output the units that stay: int64, ascending.

    Raises:
        ValueError: so few units cannot be reached.
    """
    total = sum(plan.cost * plan.site.units for plan in plans)
    kinds = [[p for p in plans if p.site.kind == HEADS], [p for p in plans if p.site.kind != HEADS]]
    most = [sum(p.cost * len(p.order) for p in kind) for kind in kinds]
    wanted = (1.0 - keep_ratio) * total
    if wanted > sum(most) + 0.5:
        raise ValueError(
            f"keep_ratio={keep_ratio!r} cannot be reached: with one unit left in every layer, "
            f"{1 - sum(most) / total:.4f} of the FLOPs remain. Use a larger keep_ratio."
        )
    goals = [wanted / (1 + lambda_ffn), wanted * lambda_ffn / (1 + lambda_ffn)]
    for one, other in ((0, 1), (1, 0)):
        excess = max(0.0, goals[one] - most[one])
        goals[one] -= excess
        goals[other] += excess
    kept = {}
    for kind, goal in zip(kinds, goals, strict=True):
        for plan, gone in zip(kind, _cut(kind, goal), strict=True):
            stays = np.setdiff1d(np.arange(plan.site.units), plan.order[:gone])
            kept[plan.site.output] = torch.from_numpy(stays)
    return kept


def _cut(plans: Sequence[Plan], goal: float) -> list[int]:
    """How many units each site loses when units go by height until their cost reaches the goal."""
    gone = [0] * len(plans)
    steps = sorted((height, i, plan.cost) for i, plan in enumerate(plans) for height in plan.heights)
    removed = 0
    for _, i, cost in steps:
        if removed >= math.floor(goal):  # a goal is a float
            break
        removed += cost
        gone[i] += 1
    return gone
