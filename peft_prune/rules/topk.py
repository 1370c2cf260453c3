"""A share of the units stays, the most important ones."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Optional

import torch

from ..layers.sharding import gathered
from ..names import module_kind
from ..selection.allocation import allocate_by_score, allocate_globally
from ..selection.device import on_cpu
from ..selection.granularity import spread
from ..selection.rows import count_in_row, row_topk_mask
from ..selection.topk import largest_in_rows
from .base import Count, Rule


@dataclass(frozen=True)
class TopK(Rule):
    """As many units as sparsity and schedule say, which compete in a row or a matrix, or share out what a group keeps.

    Args:
        allocation (`str`): `"row"`, `"local"`, `"score"` or `"global"`: units compete in the row of the matrix, the
            matrix, the kind, the model.
        granularity (`str`): what a unit is.
    """

    allocation: str = "local"
    granularity: str = "weight"

    @property
    def label(self) -> str:  # type: ignore[override]
        """In words."""
        group = f"{self.granularity} group" if ":" in self.granularity else _GROUPS[self.allocation]
        return f"top-k in the {group}"

    @property
    def structured(self) -> bool:  # type: ignore[override]
        """Whether a unit is a head, a row or a column."""
        return self.granularity in ("head", "column", "row")

    def at_first(self, layer: Any, name: str) -> int:
        """By where the schedule begins; by the final sparsity if the adapter starts at random, for tests."""
        config, target = layer.config(name), layer.target_sparsity(name)
        sparsity = config.sparsity_schedule_for(target).at(0, 1) if config.init_weights else target
        return self.count(layer, name, 1.0 - sparsity)

    def count(self, layer: Any, name: str, density: float) -> int:
        """Whole units of the matrix, or of each of its rows."""
        if self.allocation != "row":
            return super().count(layer, name, density)
        height, width = layer.block(name)
        rows, columns = layer.shape[0] // height, layer.shape[1] // width
        return rows * height * width * count_in_row(density, columns)

    def units(self, layer: Any, name: str, ranking: torch.Tensor, kept: Count) -> torch.Tensor:
        """The largest of the matrix, or of each of its rows."""
        if self.allocation != "row":
            return super().units(layer, name, ranking, kept)
        return row_topk_mask(ranking, int(kept) // ranking.shape[0])

    def counts(self, name: str, layers: list[Any], step: int, total_steps: int) -> Sequence[Optional[Count]]:
        """Schedule and allocation together."""
        config = layers[0].config(name)
        densities = [
            1.0 - config.sparsity_schedule_for(layer.target_sparsity(name)).at(step, total_steps) for layer in layers
        ]
        counts: list[Count] = [self.count(layer, name, d) for d, layer in zip(densities, layers, strict=True)]
        shared = [i for i, layer in enumerate(layers) if layer.own_sparsity(name) is None]
        if self.allocation in ("local", "row") or not shared:
            return counts
        alike = [layers[i] for i in shared]
        area = self._common_area(name, alike)
        allocated = self._allocate(name, alike, densities[shared[0]])
        for i, count in zip(shared, allocated.tolist() if on_cpu(allocated) else allocated, strict=True):
            counts[i] = count * area
        return counts

    def _common_area(self, name: str, layers: list[Any]) -> int:
        areas = {math.prod(layer.block(name)) for layer in layers}
        if len(areas) > 1:
            raise ValueError(
                f"allocation={self.allocation!r} compares blocks, which here differ in size ({min(areas)} to "
                f"{max(areas)} weights). Use allocation='local', or target matrices of one shape."
            )
        return areas.pop()

    def _allocate(self, name: str, layers: list[Any], density: float) -> Any:
        recipe = layers[0].host[name].recipe
        # one after another: scores of low rank are made, and those of several processes gathered, when asked for
        rankings = (layer.ranking(name) for layer in gathered(layers, recipe.needs_weights))
        if self.allocation == "global":
            return allocate_globally(list(rankings), density)
        kinds = [module_kind(layer.module_name) for layer in layers]
        return allocate_by_score(rankings, kinds, density, layers[0].config(name).temperature)


@dataclass(frozen=True)
class TopKOnce(Rule):
    """A share of the units of each row or n:m group stays, chosen once, from what calibration has seen.

    Args:
        granularity (`str`): `"weight"`, or an n:m pattern.
        group (`str`): what competes where units are single weights: `"row"` or `"matrix"`.
        allocation (`str`): `"local"`: all matrices alike. `"owl"`: blocks with more outliers keep more.
        share (`float`): of the sparsity, on the way to it.
    """

    granularity: str = "weight"
    group: str = "row"
    allocation: str = "local"
    share: float = field(default=1.0, kw_only=True)

    def partly(self, share: float) -> TopKOnce:
        """The rule on the way, at a share of the sparsity."""
        return replace(self, share=share)

    def density(self, layer: Any, name: str) -> float:
        """Share of a layer's units that stays."""
        return 1.0 - self.share * layer.target_sparsity(name)

    def why_missed(self) -> str:
        """Groups are what competes: rows, matrices, or n of m."""
        return "each group of units that compete keeps a whole number of them. Ask for what can be reached"

    @property
    def label(self) -> str:  # type: ignore[override]
        """In words."""
        group = self.granularity + " group" if ":" in self.granularity else self.group
        return f"top-k in the {group}" + (", shared out by outliers" if self.by_outliers else "")

    @property
    def by_outliers(self) -> bool:  # type: ignore[override]
        """Whether blocks are given sparsities first."""
        return self.allocation == "owl"

    def choose(self, layer: Any, name: str) -> torch.Tensor:
        """Bool, shape (out, in)."""
        host = layer.host[name]
        ranking = layer.ranking(name)
        kept = host.granularity.count(self.density(layer, name), layer.shape)
        if self.group == "matrix" or ":" in self.granularity:
            return spread(host.granularity.units(ranking, kept), layer.block(name))
        return largest_in_rows(ranking, count_in_row(self.density(layer, name), ranking.shape[1]))


_GROUPS = {"row": "row", "local": "matrix", "score": "kind of matrix", "global": "model"}
