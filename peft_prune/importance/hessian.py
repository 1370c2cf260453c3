"""What a layer's output loses: its Gram matrix of inputs, which solvers and refinements read."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from ..calibration.observers import GramMatrices
from ..selection.granularity import pool
from .base import Importance


@dataclass(frozen=True)
class Hessian(Importance):
    """`G = XᵀX` of a layer's inputs. As a ranking, `|W_ij|·√G_jj`, which is Wanda's; solvers read all of it."""

    label = "loss of the layer's output"
    reads_activations = True

    def observer(self, config: Any) -> GramMatrices:
        """What calibration has to note of a layer's inputs."""
        return GramMatrices()

    def rank(self, layer: Any, name: str) -> torch.Tensor:
        """Float32, shape (out / rows, in / columns)."""
        norms = layer.host[name].seen.diagonal().sqrt().to(layer.weight.device)
        return pool(layer.under_mask(name, layer.matrix.detach()).float().abs() * norms, layer.block(name))
