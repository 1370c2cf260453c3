"""Sparsities that differ from block to block, from one look at the model as it is."""

from __future__ import annotations

import math

from ..calibration.observers import InputNorms
from ..calibration.walk import Manner
from ..layers.sharding import agreed
from ..solvers.outliers import outlier_ratio, owl_sparsities
from .calibration_run import CalibrationRun


def allot_by_outliers(run: CalibrationRun) -> None:
    """Give each block a sparsity by its outliers (OWL, arXiv 2310.05175); all matrices of a block get the same.

    Those with a sparsity of their own, by `sparsity_pattern`, keep it. The mean over the others is the config's.

    Args:
        run ([`CalibrationRun`]): whose layers, and what they are shown.
    """
    shared = {path: layer for path, layer in run.layers.items() if layer.own_sparsity(run.name) is None}
    if not shared:
        return
    observer, blocks, ratios = InputNorms(), [], []

    def note(paths: list[str]) -> None:
        norms = [observer.result(path) for path in paths]
        matrices = [shared[path].matrix.detach().float().abs() for path in paths]
        ratios.append(outlier_ratio([w * x.to(w.device) for w, x in zip(matrices, norms, strict=True)]))
        blocks.append([shared[path] for path in paths])

    run.only(shared).walk(observer, note, Manner(changes=False))
    sizes = [sum(math.prod(layer.shape) for layer in layers) for layers in blocks]
    for layers, sparsity in zip(blocks, owl_sparsities(ratios, run.config.sparsity, sizes=sizes), strict=True):
        for layer in layers:
            layer.host[run.name].allotted = agreed(sparsity)
