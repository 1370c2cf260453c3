"""A calibrated start: scores begin where a look at inputs puts them, before training. Nothing is made final."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import nn

from ..calibration.walk import Manner
from ..importance.calibrated_start import CalibratedStart
from ..layers.layer import PruningLayer, pruning_layers
from ..layers.masks import WAITING, not_started
from ..layers.sharding import agreed
from .calibration_run import CalibrationRun
from .layer_by_layer import LayerByLayer
from .sparsity_reached import sparsity


def adapters_that_wait(model: nn.Module) -> dict[str, list[PruningLayer]]:
    """Layers of each adapter whose scores wait for a calibrated start, by adapter name, active or not."""
    waiting: dict[str, list[PruningLayer]] = {}
    for layer in pruning_layers(model):
        for name in layer.host:
            if layer.waits_for_start(name):
                waiting.setdefault(name, []).append(layer)
    return waiting


def calibrate_start(run: CalibrationRun) -> dict[str, float]:
    """Fill the scores of an adapter, and put in force what its schedule begins with.

    If it begins with zeros in place, a block sees what the pruned blocks before it put out. Otherwise one forward pass
    shows all layers, unless their notes take much memory, or blocks are to be run on another device.

    Args:
        run ([`CalibrationRun`]): whose layers, and what they are shown.

    Returns:
        `dict[str, float]`: `sparsity` that is in force.
    """
    name, recipe, layers = run.name, run.recipe, list(run.layers.values())
    start = recipe.importance.calibrated_start
    assert start is not None
    scores = _Start(run, start)
    dense = all(recipe.rule.at_first(layer, name) == layer.shape[0] * layer.shape[1] for layer in layers)
    with _waiting_again_on_error(name, layers):
        if dense and start.is_light and run.device is None:
            run.walk(scores.observer)
            scores.begin(run.layers)
        else:
            scores.walk(Manner(changes=not dense))
    return {"sparsity": sparsity(layers, name)}


class _Start(LayerByLayer):
    """Where the scores of each layer start."""

    def __init__(self, run: CalibrationRun, start: CalibratedStart) -> None:
        super().__init__(run, start.observer())
        self.start = start

    def _of_block(self, paths: list[str]) -> None:
        self._warn_of_few_tokens(paths)
        self.begin(paths)

    def begin(self, paths: Iterable[str]) -> None:
        """Fill the scores of some layers, in all processes by what the first one saw."""
        for path in paths:
            layer, factors = self.layers[path], agreed(self.start.factors(self.observer.result(path)))
            recipe = layer.host[self.name].recipe
            recipe.importance.begin(layer, self.name, factors.to(layer.weight.device))
            layer.set_kept(self.name, recipe.rule.at_first(layer, self.name), -1, 0)
            layer.renew(self.name)


@contextmanager
def _waiting_again_on_error(name: str, layers: list[PruningLayer]) -> Iterator[None]:
    """Leave nothing half started behind, an interrupt included."""
    try:
        yield
    except BaseException:
        for layer in layers:
            layer.set_kept(name, layer.shape[0] * layer.shape[1], WAITING, 0)
            layer.set_bits(name, torch.ones(layer.shape, dtype=torch.bool))
        raise


def check_started(adapters: Mapping[str, list[PruningLayer]], what: str) -> None:
    """Raise `ValueError` if one of some adapters waits for its start.

    Args:
        adapters (`Mapping`): layers by adapter name.
        what (`str`): what is about to happen, for the message.
    """
    for name, layers in adapters.items():
        if any(layer.waits_for_start(name) for layer in layers):
            raise ValueError(f"{what}: {not_started(name, layers[0].config(name))}")
