"""A plot of the scores that decide what is kept."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Optional

import numpy as np
from torch import nn

from .summary import density_rows, pruned_layers


if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def plot_scores(model: nn.Module, adapter_name: Optional[str] = None, bins: int = 60) -> Figure:
    """Histogram of the scores of each kind of matrix, what is kept and what is removed, with the thresholds.

    A threshold is the lowest score that is kept, and each matrix has its own, a vertical line. Where methods keep the
    largest magnitudes, those are shown. Scores are dropped after training: plot before [`peft_prune.finalize`], for
    instance with `PruningCallback(finalize_at_end=False)`, or at a checkpoint that was loaded with `is_trainable=True`.

    Args:
        model (`nn.Module`): any model that contains pruning layers in training.
        adapter_name (`str`, *optional*): by default the active adapter.
        bins (`int`): number of bars of each histogram.

    Returns:
        `matplotlib.figure.Figure`: one set of axes for each kind, its title the kind and the share kept.

    Raises:
        ValueError: the adapter is not there, or its masks are final.
    """
    from matplotlib.figure import Figure

    name, layers = pruned_layers(model, adapter_name)
    if any(name not in layer.progress or not layer.host[name].recipe.chosen_layer_by_layer for layer in layers):
        raise ValueError(
            f"Adapter {name!r} has no scores: its masks are final, or its method has none. Plot before "
            "peft_prune.finalize(model); in a Trainer, pass PruningCallback(finalize_at_end=False)."
        )
    rows = density_rows((layer.module_name, layer.shape, layer.kept(name)) for layer in layers)
    matrices: dict[str, list[tuple[np.ndarray, np.ndarray]]] = {}
    for layer, row in zip(layers, rows, strict=True):
        height, width = layer.block(name)
        scores = layer.ranking(name).detach().float().cpu().numpy()
        # one entry for each block that shares a score
        kept = layer.get_mask(name)[::height, ::width].cpu().numpy()
        matrices.setdefault(row.kind, []).append((scores, kept))
    columns = min(3, len(matrices))
    lines = math.ceil(len(matrices) / columns)
    figure = Figure(figsize=(4 * columns, 2.6 * lines), layout="constrained")
    grid = figure.subplots(lines, columns, squeeze=False).flatten()
    for axes, (kind, group) in zip(grid, matrices.items(), strict=False):
        _histogram(axes, kind, group, bins)
    for axes in grid[len(matrices) :]:
        axes.remove()
    grid[0].legend()
    return figure


def _histogram(axes: Axes, kind: str, matrices: list[tuple[np.ndarray, np.ndarray]], bins: int) -> None:
    """Draw (scores, kept) of all matrices of a kind."""
    kept = np.concatenate([scores[mask] for scores, mask in matrices])
    removed = np.concatenate([scores[~mask] for scores, mask in matrices])
    edges = np.histogram_bin_edges(np.concatenate([kept, removed]), bins).tolist()
    axes.hist([kept, removed], edges, stacked=True, label=["kept", "removed"], color=["tab:blue", "lightgrey"])
    thresholds = [float(scores[mask].min()) for scores, mask in matrices if mask.any() and not mask.all()]
    for i, threshold in enumerate(thresholds):
        axes.axvline(threshold, color="tab:red", linewidth=0.8, label="" if i else "thresholds")
    axes.set_title(f"{kind}: {100 * len(kept) / (len(kept) + len(removed)):.1f} % kept", fontsize=9, parse_math=False)
    axes.set_xlabel("score")
