"""Density by layer and kind, as rows and as a table."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Optional

from torch import nn

from ..layers.layer import PruningLayer, pruning_layers
from ..names import module_kind, one_line


if TYPE_CHECKING:
    from rich.table import Table


@dataclass(frozen=True)
class LayerDensity:
    """One pruned matrix: its name, number of its block (-1 if none), kind, (out, in) shape, weights kept."""

    name: str
    block: int
    kind: str
    shape: tuple[int, int]
    kept: int

    @property
    def size(self) -> int:
        """Number of weights."""
        return self.shape[0] * self.shape[1]

    @property
    def density(self) -> float:
        """Share of weights kept."""
        return self.kept / self.size


def layer_densities(model: nn.Module, adapter_name: Optional[str] = None) -> list[LayerDensity]:
    """What an adapter keeps of each matrix, in the order of the model.

    Args:
        model (`nn.Module`): any model that contains pruning layers.
        adapter_name (`str`, *optional*): by default the active adapter.

    Raises:
        ValueError: the adapter is not there.
    """
    name, layers = pruned_layers(model, adapter_name)
    return density_rows((layer.module_name, layer.shape, layer.kept(name)) for layer in layers)


def pruned_layers(model: nn.Module, adapter_name: Optional[str] = None) -> tuple[str, list[PruningLayer]]:
    """Name of an adapter, by default of the active one, and the layers that have it.

    Raises:
        ValueError: the adapter is not there.
    """
    layers = pruning_layers(model)
    if adapter_name is None and layers:
        adapter_name = layers[0].active_adapters[0]
    layers = [layer for layer in layers if adapter_name in layer._get_available_adapters()]
    if adapter_name is None or not layers:
        raise ValueError(f"adapter_name={adapter_name!r}: the model has no such pruning adapter.")
    return adapter_name, layers


def stored_densities(mask_info: Mapping[str, Mapping[str, Any]]) -> list[LayerDensity]:
    """What a saved adapter keeps of each matrix, by the `mask_info` of its config alone."""
    return density_rows((name, tuple(info["shape"]), info["kept"]) for name, info in mask_info.items())


def density_rows(matrices: Iterable[tuple[str, tuple[int, int], int]]) -> list[LayerDensity]:
    """Rows from (module name, shape, weights kept); kinds without what all of them begin with."""
    found = [(name, shape, kept, module_kind(name)) for name, shape, kept in matrices]
    common = common_prefix([kind for *_, kind in found])
    rows = []
    for name, shape, kept, kind in found:
        number = re.search(r"\.(\d+)\.", name)
        rows.append(LayerDensity(name, int(number[1]) if number else -1, kind.removeprefix(common), shape, kept))
    return rows


def common_prefix(kinds: list[str]) -> str:
    """What all dotted names begin with, up to a dot, so that a part of each is left."""
    split = [kind.split(".") for kind in set(kinds)]
    shared = 0
    while len({tuple(parts[: shared + 1]) for parts in split}) == 1 and all(len(p) > shared + 1 for p in split):
        shared += 1
    return "".join(part + "." for part in split[0][:shared])


def summary_table(model: nn.Module, adapter_name: Optional[str] = None) -> Table:
    """Density by kind, all layers together, as a `rich` table.

    Args:
        model (`nn.Module`): any model that contains pruning layers.
        adapter_name (`str`, *optional*): by default the active adapter.
    """
    return density_table(layer_densities(model, adapter_name))


def by_kind(rows: list[LayerDensity]) -> list[tuple[str, int, int, float, float]]:
    """(kind, weights, kept, lowest and highest density of its matrices) of each kind, and of `"all"` at the end."""
    kinds = [(kind, [r for r in rows if r.kind == kind]) for kind in dict.fromkeys(r.kind for r in rows)]
    summary = []
    for kind, group in [*kinds, ("all", rows)]:
        densities = [r.density for r in group]
        summary.append((kind, sum(r.size for r in group), sum(r.kept for r in group), min(densities), max(densities)))
    return summary


def density_table(rows: list[LayerDensity]) -> Table:
    """[`by_kind`] as a `rich` table."""
    from rich.table import Table
    from rich.text import Text

    table = Table(title="Weights kept")
    table.add_column("kind", overflow="fold")  # in a narrow terminal names go on in the next line, and numbers stay
    for heading in ("weights", "kept", "density", "lowest", "highest"):
        table.add_column(heading, justify="right", no_wrap=True)
    for kind, size, kept, lowest, highest in by_kind(rows):
        if kind == "all":
            table.add_section()
        numbers = (f"{size:,}", f"{kept:,}", f"{kept / size:.4f}", f"{lowest:.4f}", f"{highest:.4f}")
        # as text: a table of strings would read markup out of a name, such as [0]
        table.add_row(Text(one_line(kind)), *numbers, style="bold" if kind == "all" else None)
    return table
