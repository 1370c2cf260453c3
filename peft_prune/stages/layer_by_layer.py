"""Calibration of layers one after the other: what comes into a block decides on it, before the next one is run."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, Optional

import torch
from torch import nn

from ..calibration.walk import AS_IS, Manner, Watched, walk
from ..layers.layer import PruningLayer
from ..layers.sharding import agreed


def choose_layer_by_layer(
    model: nn.Module,
    name: str,
    layers: Mapping[str, PruningLayer],
    watched: Watched,
    batches: Iterable[Any],
    device: Optional[torch.device | str],
) -> dict[str, float]:
    """Put masks in force, and values where the method finds any, block by block.

    Args:
        model (`nn.Module`): the model.
        name (`str`): the adapter.
        layers (`Mapping[str, PruningLayer]`): its layers by their name in the model.
        watched: the same layers, and whether they see a decoder's tokens.
        batches (`Iterable`): calibration data.
        device (*optional*): where blocks are run.

    Returns:
        `dict[str, float]`: relative loss of each layer's output, of methods that know it.
    """
    first = next(iter(layers.values()))
    observer = first.host[name].recipe.importance.observer(first.config(name))
    return LayerByLayer(name, layers, observer).walk(model, watched, batches, device)


class LayerByLayer:
    """What is chosen for each layer, and the loss that it makes."""

    def __init__(self, name: str, layers: Mapping[str, PruningLayer], observer: Any) -> None:
        self.name, self.layers, self.observer = name, layers, observer
        self.losses: dict[str, float] = {}
        self._worst = 1.0  # tokens over tokens needed, of the layer that was last warned about

    def walk(
        self,
        model: nn.Module,
        watched: Watched,
        batches: Iterable[Any],
        device: Optional[torch.device | str],
        manner: Manner = AS_IS,
    ) -> dict[str, float]:
        """Choose for all layers, and return the losses that are known."""
        samples = next(iter(self.layers.values())).config(self.name).num_samples
        manner = replace(manner, around_block=self._kept_weights)
        with _caching(self.layers.values(), False):
            walk(model, watched, batches, self.observer, samples, self._of_block, device, manner)
        return self.losses

    def _of_block(self, paths: list[str]) -> Optional[float]:
        """Choose for the layers of a block, and return their mean loss."""
        self._warn_of_few_tokens(paths)
        for path in paths:
            layer = self.layers[path]
            layer.host[self.name].seen = self.observer.result(path)
            self._choose(layer)
            matrix = layer.matrix.detach()
            loss = self.observer.output_loss(matrix, layer.adapted(self.name, matrix), layer.host[self.name].seen)
            layer.host[self.name].seen = None
            if loss is not None:
                self.losses[path] = agreed(loss)
        losses = [self.losses[path] for path in paths if path in self.losses]
        return sum(losses) / len(losses) if losses else None

    def _kept_weights(self, paths: list[str]) -> Any:
        """While a block is run, its masked weights are kept between batches."""
        return _caching([self.layers[path] for path in paths], True)

    def _choose(self, layer: PruningLayer) -> None:
        name, recipe = self.name, layer.host[self.name].recipe
        mask, values = recipe.rule.solve(layer, name)
        layer.set_bits(name, agreed(mask.cpu()).to(layer.weight.device))
        if name in layer.progress:  # where an update is trained, its counters say what is kept
            layer.set_kept(name, int(layer.get_mask(name).sum()), *layer.steps(name))
        recipe.update.settle(layer, name, values if values is None else agreed(values.cpu()).to(mask.device))
        with torch.no_grad():
            for held in (layer.held(kind) for kind in recipe.update.tensors):
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
