"""The size of a trained update, or of a weight with its update (DSEE, Chen et al. 2023, section 3.3)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from .base import Importance


@dataclass(frozen=True)
class OfUpdate(Importance):
    """`|ΔW|`, `|W + ΔW|` or `|W|` of each weight; where a weight has no update, `|W|`.

    Args:
        kind (`str`): `"update"`, `"effective"` or `"weight"`.
    """

    kind: str = "update"

    @property
    def label(self) -> str:  # type: ignore[override]
        """In words."""
        return {"update": "size of the update", "effective": "size of the updated weight"}.get(self.kind, "size")

    def rank(self, layer: Any, name: str) -> torch.Tensor:
        """Float32, shape (out, in), on the CPU."""
        return self.of(layer, name, self.kind)

    def of(self, layer: Any, name: str, kind: str) -> torch.Tensor:
        """The same by another kind."""
        weight = layer.matrix.detach().float()
        if kind == "weight":
            return weight.abs().cpu()
        change = layer.delta(name).detach()
        return (change if kind == "update" else weight + change).abs().cpu()
