"""Weights by what comes in: magnitude times the norm of the input (Wanda, Sun et al. 2023, arXiv 2306.11695)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from ..calibration.observers import InputNorms
from ..selection.granularity import pool
from .base import Importance


@dataclass(frozen=True)
class Activation(Importance):
    """`|W_ij| · ‖x_j‖₂`, summed over the weights of a unit; `x_j` is input j over all tokens seen (eq. 1)."""

    label = "magnitude × norm of the input"
    reads_activations = True

    def observer(self, config: Any) -> InputNorms:
        """What calibration has to note of a layer's inputs."""
        return InputNorms()

    def rank(self, layer: Any, name: str) -> torch.Tensor:
        """Float32, shape (out / rows, in / columns)."""
        norms = layer.host[name].seen.to(layer.weight.device)
        return pool(layer.matrix.detach().float().abs() * norms, layer.block(name))
