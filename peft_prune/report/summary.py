"""Density by layer and kind, as rows and as a table."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Optional

from torch import nn

from ..tuners.layer import pruning_layers
from ..tuners.schedule import module_kind


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
    layers = pruning_layers(model)
    if adapter_name is None and layers:
        adapter_name = layers[0].active_adapters[0]
    layers = [layer for layer in layers if adapter_name in layer._get_available_adapters()]
    if adapter_name is None or not layers:
        raise ValueError(f"adapter_name={adapter_name!r}: the model has no such pruning adapter.")
    rows = []
    for layer in layers:
        number = re.search(r"\.(\d+)\.", layer.module_name)
        kind = module_kind(layer.module_name)
        rows.append(
            LayerDensity(
                layer.module_name, int(number[1]) if number else -1, kind, layer.shape, layer.kept(adapter_name)
            )
        )
    # without what all names begin with: "attention.self.query" says it
    common = _common_prefix([row.kind for row in rows])
    return [LayerDensity(r.name, r.block, r.kind.removeprefix(common), r.shape, r.kept) for r in rows]


def _common_prefix(kinds: list[str]) -> str:
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
    from rich.table import Table

    rows = layer_densities(model, adapter_name)
    table = Table(title="Weights kept")
    table.add_column("kind", no_wrap=True)
    for heading in ("weights", "kept", "density", "lowest", "highest"):
        table.add_column(heading, justify="right")

    def add(label: str, group: list[LayerDensity], **style: Any) -> None:
        size, kept = sum(r.size for r in group), sum(r.kept for r in group)
        densities = [r.density for r in group]
        numbers = (f"{size:,}", f"{kept:,}", f"{kept / size:.4f}", f"{min(densities):.4f}")
        table.add_row(label, *numbers, f"{max(densities):.4f}", **style)

    for kind in dict.fromkeys(r.kind for r in rows):
        add(kind, [r for r in rows if r.kind == kind])
    table.add_section()
    add("all", rows, style="bold")
    return table
