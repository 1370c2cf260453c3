"""The magnitude of the weights, as they are at present."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from ..selection.granularity import pool
from .base import Importance


@dataclass(frozen=True)
class Magnitude(Importance):
    """`|W + U|`, summed over the weights of a unit; `U` is the update."""

    label = "magnitude of the weight"

    def rank(self, layer: Any, name: str) -> torch.Tensor:
        """Float, shape (out / rows, in / columns)."""
        updated = layer.host[name].recipe.update.inside(layer, name, layer.matrix)
        return pool(updated.detach().abs(), layer.block(name))
