"""The zeros that are there: what is zero in the base weight stays zero."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from .base import Rule


@dataclass(frozen=True)
class ExistingZeros(Rule):
    """The mask is where the base weight is not zero."""

    label = "existing zeros"
    ranks = False
    finds_sparsity = True
    needs_weights = True
    cuts_units = True

    def at_first(self, layer: Any, name: str) -> int:
        """Weights that are not zero."""
        return int((layer.matrix != 0).sum())

    def choose(self, layer: Any, name: str) -> torch.Tensor:
        """Bool, shape (out, in)."""
        return layer.matrix != 0
