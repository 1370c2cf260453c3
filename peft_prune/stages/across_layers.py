"""Calibration of methods that compare layers: all are looked at, then all masks are chosen, then weights are fitted."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Optional, cast

import torch
from torch import nn

from ..calibration.batches import first_examples
from ..calibration.observers import GramMatrices
from ..calibration.replay import find_feeders
from ..calibration.walk import Manner, Watched, walk
from ..importance.units import UnitImportance
from ..layers.layer import PruningLayer
from ..structure.sites import HEADS, Site, find_sites
from .layer_by_layer import LayerByLayer


def choose_across_layers(
    model: nn.Module,
    name: str,
    by_path: Mapping[str, PruningLayer],
    watched: Watched,
    batches: Iterable[Any],
    device: Optional[torch.device | str],
) -> dict[str, float]:
    """Put masks in force, and new values if the update finds any.

    Args:
        model (`nn.Module`): the model.
        name (`str`): the adapter.
        by_path (`Mapping`): its layers by their name in the model.
        watched (`Mapping`): the same, as a walk wants them.
        batches (`Iterable`): batches of inputs.
        device (*optional*): where blocks are run that are walked one by one.

    Returns:
        `dict[str, float]`: relative loss of each layer's output, where it is known.
    """
    layers = list(by_path.values())
    recipe, config = layers[0].host[name].recipe, layers[0].config(name)
    if recipe.update.fits or recipe.rule.reads_activations:
        batches = first_examples(batches, config.num_samples)
    gone = recipe.rule.removed_first(model, name, layers, batches)
    for layer in layers:
        layer.cached_weight.clear()
        if layer.module_name in gone:
            layer.set_bits(name, torch.zeros(layer.shape, dtype=torch.bool, device=layer.weight.device))
    if not recipe.rule.removes_more(model, name, layers):
        return {}
    by_path = {path: layer for path, layer in by_path.items() if layer.module_name not in gone}
    watched = {path: watched[path] for path in by_path}
    sites = {site.output: site for site in find_sites(model)}
    seen = None
    if recipe.importance.reads_activations:
        seen = _look(model, name, by_path, watched, sites, batches, device)
    set_all(name, layers, recipe.rule.choose_all(model, name, layers, seen))
    if recipe.update.fits:
        manner = Manner(in_turn=True, feeders=find_feeders(model, sites.values()))
        return LayerByLayer(name, by_path, GramMatrices()).walk(model, watched, batches, device, manner)
    return {}


def set_all(name: str, layers: Iterable[PruningLayer], masks: Mapping[str, torch.Tensor]) -> None:
    """Put masks (bool, (out, in), by module name) in force."""
    for layer in layers:
        layer.set_bits(name, masks[layer.module_name].to(layer.weight.device))


def _look(
    model: nn.Module,
    name: str,
    by_path: Mapping[str, PruningLayer],
    watched: Watched,
    sites: Mapping[str, Site],
    batches: Iterable[Any],
    device: Optional[torch.device | str],
) -> dict[str, Any]:
    """What is seen of all layers of the model as it is, by module name."""
    first = next(iter(by_path.values()))
    importance, config = cast(UnitImportance, first.host[name].recipe.importance), first.config(name)
    observer = importance.observer(config)
    if not importance.by_block:
        walk(model, watched, batches, observer, config.num_samples)
        return {layer.module_name: observer.result(path) for path, layer in by_path.items()}
    seen = {}

    def after_block(paths: list[str]) -> None:
        for path in paths:
            layer = by_path[path]
            seen[layer.module_name] = importance.digest(layer, name, observer.result(path))

    # heads add to the stream before the block, and neurons behind the heads
    observer.streams = {path: (model.get_submodule(sites[path].block), sites[path].kind != HEADS) for path in by_path}
    walk(model, watched, batches, observer, config.num_samples, after_block, device, Manner(changes=False))
    return seen
