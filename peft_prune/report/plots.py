"""Pictures of a mask."""

from __future__ import annotations

from typing import TYPE_CHECKING, Optional

import numpy as np
from torch import nn

from .summary import LayerDensity, layer_densities
from .units import units_alive


if TYPE_CHECKING:
    from matplotlib.figure import Figure


def plot_density(model: nn.Module, adapter_name: Optional[str] = None) -> Figure:
    """Heat map of the share of weights kept, a row for each kind of matrix and a column for each block.

    Args:
        model (`nn.Module`): any model that contains pruning layers.
        adapter_name (`str`, *optional*): by default the active adapter.

    Returns:
        `matplotlib.figure.Figure`: call `savefig` on it.
    """
    return density_figure(layer_densities(model, adapter_name))


def density_figure(rows: list[LayerDensity]) -> Figure:
    """The picture of [`plot_density`] from rows, for an adapter that is only on disk."""
    cells = {(r.kind, r.block): (100 * r.density, f"{100 * r.density:.1f}") for r in rows}
    overall = 100 * sum(r.kept for r in rows) / sum(r.size for r in rows)
    return _heat_map(cells, f"Weights kept, % (all together {overall:.1f} %)")


def plot_units(model: nn.Module, adapter_name: Optional[str] = None) -> Figure:
    """Heat map of the share of heads and neurons alive, with their number in each cell, a column for each block.

    Args:
        model (`nn.Module`): a Transformers model of a known architecture that contains pruning layers.
        adapter_name (`str`, *optional*): by default the active adapter.

    Returns:
        `matplotlib.figure.Figure`: call `savefig` on it.

    Raises:
        ValueError: the adapter is not there, or the architecture is not known.
    """
    counts = units_alive(model, adapter_name)
    cells = {(f"{c.kind}, {c.place}", c.block): (100 * c.alive / c.total, str(c.alive)) for c in counts}
    sums = []
    for kind in dict.fromkeys(c.kind for c in counts):
        group = [c for c in counts if c.kind == kind]
        sums.append(f"{sum(c.alive for c in group):,} of {sum(c.total for c in group):,} {kind}")
    return _heat_map(cells, f"Alive: {', '.join(sums)} (colour: %)")


def _heat_map(cells: dict[tuple[str, int], tuple[float, str]], title: str) -> Figure:
    """A row for each name and a column for each block of (name, block): (value in %, text)."""
    from matplotlib.figure import Figure

    names = list(dict.fromkeys(name for name, _ in cells))
    blocks = sorted({block for _, block in cells})
    values = np.full((len(names), len(blocks)), np.nan)
    for (name, block), (value, _) in cells.items():
        values[names.index(name), blocks.index(block)] = value
    figure = Figure(figsize=(3.2 + 0.62 * len(blocks), 1.4 + 0.42 * len(names)), layout="constrained")
    axes = figure.subplots()
    image = axes.imshow(values, aspect="auto", cmap="viridis")
    axes.set_xticks(range(len(blocks)), [str(block) for block in blocks])
    axes.set_yticks(range(len(names)), names)
    axes.set_xlabel("block")
    axes.set_title(title)
    middle = (np.nanmin(values) + np.nanmax(values)) / 2
    for (name, block), (value, text) in cells.items():
        axes.text(blocks.index(block), names.index(name), text, ha="center", va="center", fontsize=8,
                  color="white" if value <= middle else "black")  # fmt: skip
    figure.colorbar(image, ax=axes)
    return figure
