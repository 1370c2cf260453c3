"""How many units each layer keeps: as the importance says, or as many in every layer, in multiples of a number."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from .sites import HEADS


if TYPE_CHECKING:
    from .budget import Plan


SHAPES = ("free", "uniform")


@dataclass(frozen=True)
class Shapes:
    """
    Attributes:
        kind (`str`): `"free"`: each layer keeps what the importance says. `"uniform"`: all layers keep as many heads,
            and as many neurons.
        multiple_of (`int`): the neurons that a layer keeps are a multiple of it, unless it keeps all.
    """

    kind: str = "free"
    multiple_of: int = 1

    def steps(self, plan: Plan) -> list[int]:
        """Units that go at once, one step after the other."""
        count, size = len(plan.order), 1 if plan.site.kind == HEADS else self.multiple_of
        first = plan.site.units % size or size
        if count < first:
            return []
        return [first] + [size] * ((count - first) // size)

    def made_uniform(self, plans: Sequence[Plan], gone: Sequence[int], wanted: float) -> list[int]:
        """Units that go of each site, as many stay in all of a kind, when `gone` would go by importance alone.

        The number of heads is the one below or above their mean, whichever loses less; neurons make up for the rest.

        Args:
            plans (`Sequence[Plan]`): a plan for each site.
            gone (`Sequence[int]`): units that would go of each.
            wanted (`float`): cost that has to go.

        Raises:
            ValueError: so much cannot go when all layers are alike.
        """
        heads = [i for i, plan in enumerate(plans) if plan.site.kind == HEADS]
        neurons = [i for i, plan in enumerate(plans) if plan.site.kind != HEADS]
        mean = sum(gone[i] for i in heads) / max(1, len(heads))
        choices = []
        for number in {math.floor(mean), math.ceil(mean)}:
            counts = [0] * len(plans)
            for i in heads:
                counts[i] = number
            rest = wanted - sum(number * plans[i].cost for i in heads)
            for i, count in zip(neurons, self._equal([plans[i] for i in neurons], rest), strict=True):
                counts[i] = count
            removed = sum(count * plan.cost for count, plan in zip(counts, plans, strict=True))
            fits = all(count <= len(plan.order) for count, plan in zip(counts, plans, strict=True))
            if fits and removed >= int(wanted):
                lost = sum(plan.cost * float(plan.heights[:c].sum()) for c, plan in zip(counts, plans, strict=True))
                choices.append((lost, counts))
        if not choices:
            raise ValueError(
                "shapes='uniform': so small a keep_ratio cannot be reached when every layer keeps as many heads and "
                "neurons. Use a larger keep_ratio, a smaller min_share or multiple_of, or shapes='free'."
            )
        return min(choices)[1]

    def _equal(self, plans: Sequence[Plan], rest: float) -> list[int]:
        """Neurons that go of each site, so that as many stay in all and the rest of the cost is gone."""
        if not plans or rest <= 0:
            return [0] * len(plans)
        stays = int((sum(plan.cost * plan.site.units for plan in plans) - rest) / sum(plan.cost for plan in plans))
        stays = min(stays // self.multiple_of * self.multiple_of, *(plan.site.units for plan in plans))
        return [plan.site.units - stays for plan in plans]


FREE = Shapes()
