"""Pictures of a mask."""

from __future__ import annotations

from typing import TYPE_CHECKING, Optional

import numpy as np
from torch import nn

from .summary import LayerDensity, layer_densities
from .units import units_alive


if TYPE_CHECKING:
    from matplotlib.figure import Figure


_LEAST_SPAN = 10.0  # percentage points


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
    values = [value for value, _ in cells.values()]
    return _heat_map(cells, f"Weights kept, %\n(all together {overall:.1f} %)", _limits(min(values), max(values)))


def _limits(low: float, high: float) -> tuple[float, float]:
    """Ends of a colour scale in %: those of the values, apart enough for colours to mean something."""
    if high - low < _LEAST_SPAN:
        low = min(max(0.0, (low + high - _LEAST_SPAN) / 2), 100.0 - _LEAST_SPAN)
        high = low + _LEAST_SPAN
    return low, high


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
    return _heat_map(cells, "\n".join(["Alive (colour: %)", *sums]), (0.0, 100.0))


def _heat_map(cells: dict[tuple[str, int], tuple[float, str]], title: str, limits: tuple[float, float]) -> Figure:
    """A row for each name and a column for each block of (name, block): (value in %, text)."""
    from matplotlib.figure import Figure

    names = list(dict.fromkeys(name for name, _ in cells))
    blocks = sorted({block for _, block in cells})
    values = np.full((len(names), len(blocks)), np.nan)
    for (name, block), (value, _) in cells.items():
        values[names.index(name), blocks.index(block)] = value
    lines = title.count("\n")
    figure = Figure(figsize=(4.0 + 0.62 * len(blocks), 1.4 + 0.17 * lines + 0.42 * len(names)), layout="constrained")
    axes = figure.subplots()
    image = axes.imshow(values, aspect="auto", cmap="viridis", vmin=limits[0], vmax=limits[1])
    axes.set_xticks(range(len(blocks)), [str(block) for block in blocks])
    axes.set_yticks(range(len(names)), names, parse_math=False)  # a $ in a name is no formula
    axes.set_xlabel("block")
    axes.set_title(title, fontsize=10)
    dark = limits[0] + 0.6 * (limits[1] - limits[0])  # below it white can be read
    for (name, block), (value, text) in cells.items():
        axes.text(blocks.index(block), names.index(name), text, ha="center", va="center", fontsize=8,
                  color="white" if value <= dark else "black")  # fmt: skip
    figure.colorbar(image, ax=axes)
    return figure
