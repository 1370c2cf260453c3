"""Calibration of methods that compare layers: all are looked at, then all masks are chosen, then weights are fitted."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, cast

import torch

from ..calibration.observers import GramMatrices
from ..calibration.replay import find_feeders
from ..calibration.sensitivity import output_sensitivity
from ..calibration.walk import Manner
from ..importance.units import UnitImportance
from ..layers.layer import PruningLayer
from ..structure.sites import find_sites
from .calibration_run import CalibrationRun
from .layer_by_layer import LayerByLayer


def choose_across_layers(run: CalibrationRun) -> dict[str, float]:
    """Put masks in force, and new values if the update finds any.

    Args:
        run ([`CalibrationRun`]): whose layers, and what they are shown.

    Returns:
        `dict[str, float]`: relative loss of each layer's output, where it is known.
    """
    model, name, recipe = run.model, run.name, run.recipe
    layers = list(run.layers.values())
    if recipe.update.fits or recipe.importance.by_block or recipe.rule.reads_activations:
        run = run.with_first_examples()
    gone = recipe.rule.removed_first(model, name, layers, run.batches)
    for layer in layers:
        layer.cached_weight.clear()
        if layer.module_name in gone:
            layer.set_bits(name, torch.zeros(layer.shape, dtype=torch.bool, device=layer.weight.device))
    if not recipe.rule.removes_more(model, name, layers):
        return {}
    run = run.only({path: layer for path, layer in run.layers.items() if layer.module_name not in gone})
    seen = _look(run) if recipe.importance.reads_activations else None
    set_all(name, layers, recipe.rule.choose_all(model, name, layers, seen))
    if recipe.update.fits:
        manner = Manner(in_turn=True, feeders=find_feeders(model, find_sites(model)))
        return LayerByLayer(run, GramMatrices()).walk(manner)
    return {}


def set_all(name: str, layers: Iterable[PruningLayer], masks: Mapping[str, torch.Tensor]) -> None:
    """Put masks (bool, (out, in), by module name) in force."""
    for layer in layers:
        layer.set_bits(name, masks[layer.module_name].to(layer.weight.device))


def _look(run: CalibrationRun) -> dict[str, Any]:
    """What is seen of all layers of the model as it is, by module name."""
    importance, by_path = cast(UnitImportance, run.recipe.importance), run.layers
    observer = importance.observer(run.config)
    if not importance.by_block:
        run.walk(observer)
        return {layer.module_name: observer.result(path) for path, layer in by_path.items()}
    sensitivity = output_sensitivity(run.model, run.watched, run.batches, run.config.num_samples)
    seen = {}

    def after_block(paths: list[str]) -> None:
        for path in paths:
            layer, tokens = by_path[path], observer.tokens.get(path, 0)
            noted = (observer.result(path), tokens, sensitivity[path])
            seen[layer.module_name] = importance.digest(layer, run.name, noted)

    run.walk(observer, after_block, Manner(changes=False))
    return seen
