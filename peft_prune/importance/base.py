"""What every importance has: a ranking of the units of a matrix, and what the mask does to a weight."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar, Optional

import torch

from ..storage.bits import masked_by_bits


if TYPE_CHECKING:
    from .calibrated_start import CalibratedStart


class Importance:
    """Ranks the units of a matrix. A subclass says how; one that learns says what it trains.

    An importance holds no state: tensors are the layer's, `layer.held(kind)[adapter name]`.
    """

    label: ClassVar[str] = ""
    # kinds of trained tensors that it owns, such as ("scores",)
    tensors: ClassVar[tuple[str, ...]] = ()
    # whether the ranking follows from base weights
    needs_weights: ClassVar[bool] = True
    # whether calibration has to look at what comes into a layer
    reads_activations: ClassVar[bool] = False
    # whether calibration looks block by block, even if nothing is changed on the way
    by_block: ClassVar[bool] = False
    # whether training multiplies by gates between 0 and 1, which follow from the scores and not from the mask
    gates: ClassVar[bool] = False
    # where the penalty's sigmoid has its middle
    penalty_offset: ClassVar[float] = 0.0

    @property
    def calibrated_start(self) -> Optional[CalibratedStart]:
        """Where trained scores start if that has to be calibrated before training."""
        return None

    def begin(self, layer: Any, name: str, factors: torch.Tensor) -> None:
        """Let trained scores start at what calibration has found: see [`CalibratedStart.factors`]."""
        raise NotImplementedError

    def add(self, layer: Any, name: str) -> None:
        """Give an adapter what is trained; nothing by default."""

    def observer(self, config: Any) -> Any:
        """What takes notes of a layer's inputs in calibration, see `calibration.observers`."""
        raise NotImplementedError

    def rank(self, layer: Any, name: str) -> torch.Tensor:
        """What decides which units stay, the largest first: float, shape (out / rows, in / columns)."""
        raise NotImplementedError

    def scores(self, layer: Any, name: str) -> tuple[Optional[torch.Tensor], Optional[torch.Tensor]]:
        """What receives the gradient of the scores, and the factor of the penalty's gradient that is added to it."""
        return None, None

    def masked(self, layer: Any, name: str, matrix: torch.Tensor) -> torch.Tensor:
        """What stays of a matrix (out, in) in a forward pass, with gradients for scores and matrix."""
        return self.settled(layer, name, matrix)

    def settled(self, layer: Any, name: str, matrix: torch.Tensor) -> torch.Tensor:
        """What stays of a matrix (out, in) in inference, and when it is merged."""
        if matrix.requires_grad and torch.is_grad_enabled():
            return matrix * layer.get_mask(name)
        return masked_by_bits(matrix, layer.mask_bits(name))
