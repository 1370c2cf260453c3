"""Two updates of one adapter: one of the weights under the mask, and one beside it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Optional

import torch

from .base import Update


@dataclass(frozen=True)
class Together(Update):
    """New values under the mask, and what is added beside it. Each has tensors and a stored form of its own.

    Args:
        under ([`Update`]): what happens to the weights that stay. It settles first.
        next_to ([`Update`]): what is added to them, and makes up for what is still missing then.
    """

    under: Update
    next_to: Update

    @property
    def label(self) -> str:  # type: ignore[override]
        """In words."""
        return f"{self.under.label}; {self.next_to.label}"

    @property
    def stores(self) -> str:  # type: ignore[override]
        """What a final adapter holds, in words."""
        return f"{self.under.stores}; the factors of the update"

    @property
    def tensors(self) -> tuple[str, ...]:  # type: ignore[override]
        """Of both."""
        return (*self.under.tensors, *self.next_to.tensors)

    @property
    def stored(self) -> tuple[str, ...]:  # type: ignore[override]
        """Of both."""
        return (*self.under.stored, *self.next_to.stored)

    @property
    def watched(self) -> tuple[str, ...]:  # type: ignore[override]
        """Of both."""
        return (*self.under.watched, *self.next_to.watched)

    @property
    def trains_under_mask(self) -> bool:  # type: ignore[override]
        """Whether either does."""
        return self.under.trains_under_mask or self.next_to.trains_under_mask

    @property
    def fits(self) -> bool:  # type: ignore[override]
        """Whether either does."""
        return self.under.fits or self.next_to.fits

    def add(self, layer: Any, name: str) -> None:
        """The tensors of both."""
        self.under.add(layer, name)
        self.next_to.add(layer, name)

    def changes_weights(self, layer: Any, name: str) -> bool:
        """Whether either does."""
        return self.under.changes_weights(layer, name) or self.next_to.changes_weights(layer, name)

    def addend(self, layer: Any, name: str) -> Optional[torch.Tensor]:
        """What the first one adds: the second one is not under the mask."""
        return self.under.addend(layer, name)

    def inside(self, layer: Any, name: str, matrix: torch.Tensor) -> torch.Tensor:
        """What the first one makes of the matrix."""
        return self.under.inside(layer, name, matrix)

    def outside(self, layer: Any, name: str, merging: bool = False) -> Optional[torch.Tensor]:
        """What the second one adds."""
        return self.next_to.outside(layer, name, merging)

    def beside(self, layer: Any, name: str, x: torch.Tensor, result: torch.Tensor) -> torch.Tensor:
        """The output, with what the second one adds."""
        return self.next_to.beside(layer, name, x, result)

    def delta(self, layer: Any, name: str) -> torch.Tensor:
        """The sum of both."""
        return self.under.delta(layer, name) + self.next_to.delta(layer, name)

    def settle(self, layer: Any, name: str, values: Optional[torch.Tensor]) -> None:
        """Take over the values; then make up for what is missing."""
        self.under.settle(layer, name, values)
        self.next_to.settle(layer, name, None)

    def final(self, layer: Any, name: str, mask: torch.Tensor) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
        """The records and buffers of both."""
        parts = [update.final(layer, name, mask) for update in (self.under, self.next_to)]
        return parts[0][0] | parts[1][0], parts[0][1] | parts[1][1]

    def check_stored(self, layer: Any, name: str, kind: str, found: torch.Tensor) -> None:
        """As the one that the tensor belongs to."""
        for update in (self.under, self.next_to):
            if kind in (*update.tensors, *update.stored):
                update.check_stored(layer, name, kind, found)

    def kept_when_final(self) -> tuple[str, ...]:
        """Of both."""
        return (*self.under.kept_when_final(), *self.next_to.kept_when_final())
