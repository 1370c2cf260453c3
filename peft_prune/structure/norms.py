"""Importance of heads and neurons by their weights alone."""

from __future__ import annotations

import torch
from torch import nn

from .sites import Site, linear_matrix


def unit_norms(model: nn.Module, site: Site) -> torch.Tensor:
    """Euclidean norm of all weights of each unit: float32, shape (units,), on the CPU."""
    matrix = linear_matrix(model.get_submodule(site.output)).detach().float()
    squares = matrix.square().sum(0).cpu()[site.columns].sum(1)
    for name, rows in site.rows.items():
        matrix = linear_matrix(model.get_submodule(name)).detach().float()
        squares = squares + matrix.square().sum(1).cpu()[rows].sum(1)
    return squares.sqrt()
