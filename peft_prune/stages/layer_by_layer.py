"""Calibration of layers one after the other: what comes into a block decides on it, before the next one is run."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, Optional

import torch

from ..calibration.walk import AS_IS, Manner
from ..layers.layer import PruningLayer
from ..layers.sharding import agreed
from ..rules.base import Rule
from .calibration_run import CalibrationRun


def choose_layer_by_layer(run: CalibrationRun, rule: Optional[Rule] = None) -> dict[str, float]:
    """Put masks in force, and values where the method finds any, block by block.

    Args:
        run ([`CalibrationRun`]): whose layers, and what they are shown.
        rule ([`Rule`], *optional*): which weights stay; by default as the recipe says.

    Returns:
        `dict[str, float]`: relative loss of each layer's output, of methods that know it.
    """
    return LayerByLayer(run, run.recipe.importance.observer(run.config), rule).walk()


class LayerByLayer:
    """What is chosen for each layer, and the loss that it makes."""

    def __init__(self, run: CalibrationRun, observer: Any, rule: Optional[Rule] = None) -> None:
        self.rule = rule or run.recipe.rule
        self.run, self.name, self.layers, self.observer = run, run.name, run.layers, observer
        self.losses: dict[str, float] = {}
        self._worst = 1.0  # tokens over tokens needed, of the layer that was last warned about

    def walk(self, manner: Manner = AS_IS) -> dict[str, float]:
        """Choose for all layers, and return the losses that are known."""
        with _caching(self.layers.values(), False):
            self.run.walk(self.observer, self._of_block, replace(manner, around_block=self._kept_weights))
        return self.losses

    def _of_block(self, paths: list[str]) -> Optional[float]:
        """Choose for the layers of a block, and return their mean loss."""
        self._warn_of_few_tokens(paths)
        for path in paths:
            layer = self.layers[path]
            layer.host[self.name].seen = self.observer.result(path)
            matrix = before = layer.matrix.detach()
            if self.name in layer.progress:  # it may have been trained and pruned in part
                before = layer.under_mask(self.name, matrix).detach()
            self._choose(layer)
            loss = self.observer.output_loss(before, layer.adapted(self.name, matrix), layer.host[self.name].seen)
            layer.host[self.name].seen = None
            if loss is not None:
                self.losses[path] = agreed(loss)
        losses = [self.losses[path] for path in paths if path in self.losses]
        return sum(losses) / len(losses) if losses else None

    def _kept_weights(self, paths: list[str]) -> Any:
        """While a block is run, its masked weights are kept between batches."""
        return _caching([self.layers[path] for path in paths], True)

    def _choose(self, layer: PruningLayer) -> None:
        name, update = self.name, layer.host[self.name].recipe.update
        mask, values = self.rule.solve(layer, name)
        layer.set_bits(name, agreed(mask.cpu()).to(layer.weight.device))
        if name in layer.progress:  # where an update is trained, its counters say what is kept
            layer.set_kept(name, int(layer.get_mask(name).sum()), *layer.steps(name))
        update.settle(layer, name, values if values is None else agreed(values.cpu()).to(mask.device))
        with torch.no_grad():
            for held in (layer.held(kind) for kind in update.tensors):
                if name in held:  # what the update starts from, too, is that of the first process
                    held[name].copy_(agreed(held[name].detach().cpu()))

    def _warn_of_few_tokens(self, paths: list[str]) -> None:
        """Of each block, warn about the layer that saw the fewest, unless one before it saw fewer still."""
        shares = {path: self._tokens(path) / self.observer.needed(self.layers[path].in_features) for path in paths}
        path = min(shares, key=lambda path: shares[path])
        if not 0 < shares[path] < self._worst:
            return
        self._worst = shares[path]
        inputs = self.layers[path].in_features
        warnings.warn(
            f"calibrate: {path!r} saw {self._tokens(path):,} tokens for {inputs:,} inputs; "
            f"{self.observer.needed(inputs):,} are the least for a sound estimate. Pass more or longer texts.",
            UserWarning,
            stacklevel=2,
        )

    def _tokens(self, path: str) -> int:
        return self.observer.tokens.get(path, 0)


@contextmanager
def _caching(layers: Iterable[PruningLayer], enabled: bool) -> Iterator[None]:
    """Layers that keep their masked weight, or do not: kept by all, they would take as much memory as the model."""
    caches = [layer.cached_weight for layer in layers]
    before = [cache.enabled for cache in caches]
    for cache in caches:
        cache.enabled = enabled
        cache.clear()
    try:
        yield
    finally:
        for cache, was in zip(caches, before, strict=True):
            cache.enabled = was
            cache.clear()
