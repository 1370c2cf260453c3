"""Heads and neurons that an adapter leaves alive."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Optional

import torch
from torch import nn

from ..layers.layer import PruningLayer
from ..names import module_kind
from ..peft_api import base_of
from ..structure.shrink import removable_units
from ..structure.sites import find_sites, linear_matrix
from .summary import common_prefix, pruned_layers


if TYPE_CHECKING:
    from rich.table import Table


@dataclass(frozen=True)
class UnitCount:
    """Units of one attention or feed-forward network.

    Attributes:
        name (`str`): name of the matrix whose columns the units are.
        block (`int`): number of the block, -1 if it has none.
        place (`str`): name without numbers and without what all of them begin with.
        kind (`str`): `"heads"` or `"neurons"`. Heads that share keys and values count once for their group.
        alive (`int`): units that contribute something.
        total (`int`): units of the base model.
    """

    name: str
    block: int
    place: str
    kind: str
    alive: int
    total: int


def units_alive(model: nn.Module, adapter_name: Optional[str] = None) -> list[UnitCount]:
    """Count the heads and neurons that an adapter leaves alive, in the order of the model.

    A unit is dead when all weights that read it are removed, or for a head all that make its values: what
    [`peft_prune.shrink`] would take out after a merge. Masks of single weights seldom kill a whole unit.

    Args:
        model (`nn.Module`): a Transformers model of a known architecture that contains pruning layers.
        adapter_name (`str`, *optional*): by default the active adapter.

    Raises:
        ValueError: the adapter is not there, or the architecture is not known.
    """
    adapter_name, layers = pruned_layers(model, adapter_name)
    pruned: dict[nn.Module, PruningLayer] = {layer: layer for layer in layers}

    def matrix_of(module: nn.Module) -> torch.Tensor:
        matrix = linear_matrix(module).detach()
        return pruned[module].adapted(adapter_name, matrix) if module in pruned else matrix

    base = base_of(model)
    sites = find_sites(base)
    kinds = [module_kind(site.key) for site in sites]
    common = common_prefix(kinds)
    counts = []
    for site, kind in zip(sites, kinds, strict=True):
        number = re.search(r"\.(\d+)\.", site.key)
        alive = site.units - int(removable_units(base, site, matrix_of).sum())
        place = kind.removeprefix(common)
        counts.append(UnitCount(site.output, int(number[1]) if number else -1, place, site.kind, alive, site.units))
    return counts


def units_table(model: nn.Module, adapter_name: Optional[str] = None) -> Table:
    """[`units_alive`] as a `rich` table, a row for each block and a sum at the end.

    Args:
        model (`nn.Module`): a Transformers model of a known architecture that contains pruning layers.
        adapter_name (`str`, *optional*): by default the active adapter.
    """
    from rich.table import Table
    from rich.text import Text

    counts = units_alive(model, adapter_name)
    places = list(dict.fromkeys((c.place, c.kind) for c in counts))
    table = Table(title="Heads and neurons alive")
    table.add_column("block", no_wrap=True)
    for place, kind in places:
        table.add_column(Text(f"{kind}\n{place}"), justify="right")  # as text, so that no markup is read out of names

    def cells(group: list[UnitCount]) -> list[str]:
        of_place = [[c for c in group if (c.place, c.kind) == entry] for entry in places]
        return [f"{sum(c.alive for c in g):,} of {sum(c.total for c in g):,}" if g else "" for g in of_place]

    for block in sorted({c.block for c in counts}):
        table.add_row(str(block), *cells([c for c in counts if c.block == block]))
    table.add_section()
    table.add_row("all", *cells(counts), style="bold")
    return table
