"""Calibration that fails, or is interrupted, leaves layers as they were."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from ..layers.layer import PruningLayer


@contextmanager
def taken_back_on_error(name: str, layers: list[PruningLayer]) -> Iterator[None]:
    """Leave nothing half pruned behind, an interrupt included."""
    kinds = ("bits", "progress", *layers[0].host[name].recipe.update.tensors)
    before = [
        {kind: layer.held(kind)[name].detach().cpu().clone() for kind in kinds if name in layer.held(kind)}
        for layer in layers
    ]
    try:
        yield
    except BaseException:
        for layer, held in zip(layers, before, strict=True):
            layer.host[name].seen = layer.host[name].allotted = None
            layer.host[name].drop_decoded()
            layer.cached_weight.clear()
            if "bits" not in held and name in layer.held("bits"):
                del layer.held("bits")[name]
            with torch.no_grad():
                for kind, tensor in held.items():
                    layer.held(kind)[name].copy_(tensor)
        raise
