"""Pictures of a mask."""

from __future__ import annotations

from typing import TYPE_CHECKING, Optional

import numpy as np
from torch import nn

from .summary import LayerDensity, layer_densities


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
    from matplotlib.figure import Figure

    kinds = list(dict.fromkeys(r.kind for r in rows))
    blocks = sorted({r.block for r in rows})
    values = np.full((len(kinds), len(blocks)), np.nan)
    for r in rows:
        values[kinds.index(r.kind), blocks.index(r.block)] = 100 * r.density
    figure = Figure(figsize=(3.2 + 0.62 * len(blocks), 1.4 + 0.42 * len(kinds)), layout="constrained")
    axes = figure.subplots()
    image = axes.imshow(values, aspect="auto", cmap="viridis")
    axes.set_xticks(range(len(blocks)), [str(block) for block in blocks])
    axes.set_yticks(range(len(kinds)), kinds)
    axes.set_xlabel("block")
    overall = 100 * sum(r.kept for r in rows) / sum(r.size for r in rows)
    axes.set_title(f"Weights kept, % (all together {overall:.1f} %)")
    middle = (np.nanmin(values) + np.nanmax(values)) / 2
    for (i, j), value in np.ndenumerate(values):
        if not np.isnan(value):
            axes.text(j, i, f"{value:.1f}", ha="center", va="center", fontsize=8,
                      color="white" if value <= middle else "black")  # fmt: skip
    figure.colorbar(image, ax=axes)
    return figure
