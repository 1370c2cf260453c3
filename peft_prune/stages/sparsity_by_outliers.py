"""Sparsities that differ from block to block, from one look at the model as it is."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any, Optional

import torch
from torch import nn

from ..calibration.observers import InputNorms
from ..calibration.walk import Manner, Watched, walk
from ..layers.layer import PruningLayer
from ..layers.sharding import agreed
from ..solvers.outliers import outlier_ratio, owl_sparsities


def allot_by_outliers(
    model: nn.Module,
    name: str,
    by_path: Mapping[str, PruningLayer],
    watched: Watched,
    batches: Iterable[Any],
    device: Optional[torch.device | str],
) -> None:
    """Give each block a sparsity by its outliers (OWL, arXiv 2310.05175); all matrices of a block get the same.

    Those with a sparsity of their own, by `sparsity_pattern`, keep it. The mean over the others is the config's.

    Args:
        model (`nn.Module`): the model.
        name (`str`): the adapter.
        by_path (`Mapping`): its layers by their name in the model.
        watched (`Mapping`): the same, as a walk wants them.
        batches (`Iterable`): batches of inputs.
        device (*optional*): where blocks are run.
    """
    shared = {path: layer for path, layer in by_path.items() if layer.own_sparsity(name) is None}
    if not shared:
        return
    config = next(iter(shared.values())).config(name)
    observer, blocks, ratios = InputNorms(), [], []

    def note(paths: list[str]) -> None:
        norms = [observer.result(path) for path in paths]
        matrices = [by_path[path].matrix.detach().float().abs() for path in paths]
        ratios.append(outlier_ratio([w * x.to(w.device) for w, x in zip(matrices, norms, strict=True)]))
        blocks.append([shared[path] for path in paths])

    watched = {path: watched[path] for path in shared}
    walk(model, watched, batches, observer, config.num_samples, note, device, Manner(changes=False))
    sizes = [sum(math.prod(layer.shape) for layer in layers) for layers in blocks]
    for layers, sparsity in zip(blocks, owl_sparsities(ratios, config.sparsity, sizes=sizes), strict=True):
        for layer in layers:
            layer.host[name].allotted = agreed(sparsity)
