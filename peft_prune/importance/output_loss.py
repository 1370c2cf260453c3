"""Heads and neurons by what a layer's output loses without them: Optimal Brain Surgeon for groups of columns."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Optional

import numpy as np
import torch
from torch import nn

from ..calibration.observers import GramMatrices
from ..solvers.units import order_without_repair, removal_order, unit_losses
from ..structure.sites import Site
from .units import UnitImportance


CRITERIA = ("loss", "activation")


@dataclass(frozen=True)
class OutputLoss(UnitImportance):
    """Units go by the loss of the output of the matrix that they feed, times how much predictions depend on it.

    That makes layers comparable: with the error `e_t` of a layer's output at token t and the gradient `g_t` of the
    log-likelihood of the model's own predictions, their KL divergence grows by `½ Σ_t E[(g_tᵀe_t)²]` to second order.
    If size and direction of the two have nothing to do with each other, that is `½ Σ_t E‖g_t‖²/outputs · E‖e_t‖²`.

    Args:
        criterion (`str`): `"loss"`: greedily, each time the unit that costs least when the others make up for it, or
            without repair, when they do not. `"activation"`: `‖W_j‖·rms(x_j)`, each unit by itself.
        repaired (`bool`): whether the weights that stay will be repaired.
        damping (`float`): of the Gram matrix, as a share of its mean diagonal.
        seed (`int`): not used.
    """

    criterion: str = "loss"
    repaired: bool = True
    damping: float = 0.01
    seed: int = 0

    reads_activations = True
    comparable = True
    by_block = True

    @property
    def label(self) -> str:  # type: ignore[override]
        """In words."""
        return "loss of the output" if self.criterion == "loss" else "size of weights × activations"

    def observer(self, config: Any) -> GramMatrices:
        """Gram matrices of what the units put out."""
        return GramMatrices()

    def digest(self, layer: Any, name: str, seen: Any) -> tuple[np.ndarray, np.ndarray]:
        """Heights and order of a layer's units, from the Gram matrix, its tokens and the output's sensitivity."""
        gram, tokens, sensitivity = seen
        order, losses = self._order(layer, name, gram)
        # a unit that hides another one goes first, and may cost more
        heights = torch.cummax(losses.double(), 0).values * (sensitivity / tokens)
        return heights.cpu().numpy(), order.cpu().numpy()

    def order(
        self, model: nn.Module, site: Site, seen: Any, generator: torch.Generator
    ) -> tuple[np.ndarray, np.ndarray]:
        """As for every importance of units; it was found when the layer was seen."""
        return seen

    def order_again(self, layer: Any, name: str, count: int) -> Optional[torch.Tensor]:
        """The first units of the order, with the inputs that come from pruned layers."""
        return self._order(layer, name, layer.host[name].seen, count)[0]

    def _order(
        self, layer: Any, name: str, gram: torch.Tensor, count: Optional[int] = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        weight, units = layer.matrix.detach().to(gram), layer.host[name].units
        if self.criterion == "activation":
            losses, order = unit_losses(weight, gram, units).sort(stable=True)
            end = len(units) - 1 if count is None else count
            return order[:end], losses[:end]
        if self.repaired:
            return removal_order(weight, gram, units, count, self.damping)
        return order_without_repair(weight, gram, units, count)
