"""What every update has: a place under the mask or outside it, and a stored form."""

from __future__ import annotations

from typing import Any, ClassVar, Optional

import torch


class Update:
    """What happens to the weights that stay. This one leaves them as they are.

    An update holds no state: tensors are the layer's, `layer.held(kind)[adapter name]`.
    """

    label: ClassVar[str] = "none"
    stores: ClassVar[str] = "mask, at most 1 bit per weight"  # what a final adapter holds, in words
    tensors: ClassVar[tuple[str, ...]] = ()  # kinds of trained tensors that it owns
    stored: ClassVar[tuple[str, ...]] = ()  # kinds of buffers that it owns
    trains_under_mask: ClassVar[bool] = False  # whether what is trained is seen through the mask
    apart: ClassVar[bool] = False  # whether it is multiplied by itself in half precision, as in LoRA
    fits: ClassVar[bool] = False  # whether it looks at inputs behind pruned layers, once all masks are chosen
    watched: ClassVar[tuple[str, ...]] = ()  # of the trained ones, those that move from the first step on

    def add(self, layer: Any, name: str) -> None:
        """Give an adapter the update's tensors: to be trained, or to be loaded if the adapter is final."""

    def changes_weights(self, layer: Any, name: str) -> bool:
        """Whether an adapter has weights of its own in a layer, and not only a mask."""
        return any(name in layer.held(kind) for kind in (*self.tensors, *self.stored))

    def addend(self, layer: Any, name: str) -> Optional[torch.Tensor]:
        """What is added to the weight under the mask, with gradients: float, shape (out, in); `None` for nothing."""
        return None

    def inside(self, layer: Any, name: str, matrix: torch.Tensor) -> torch.Tensor:
        """A matrix (out, in) with what of the update is under the mask, in the dtype of the matrix."""
        addend = self.addend(layer, name)
        return matrix if addend is None else (matrix + addend).to(matrix.dtype)

    def outside(self, layer: Any, name: str, merging: bool = False) -> Optional[torch.Tensor]:
        """What of the update no mask touches: float, shape (out, in); `None` if there is nothing."""
        return None

    def beside(self, layer: Any, name: str, x: torch.Tensor, result: torch.Tensor) -> torch.Tensor:
        """A layer's output, with what [`outside`] adds to it for an input, without a matrix of the weight's size."""
        return result

    def delta(self, layer: Any, name: str) -> torch.Tensor:
        """The whole update: float32, shape (out, in)."""
        return torch.zeros(layer.shape, device=layer.weight.device)

    def settle(self, layer: Any, name: str, values: Optional[torch.Tensor]) -> None:
        """Take over what calibration found for a layer, whose new mask is set; nothing by default.

        Args:
            layer ([`PruningLayer`]): the layer; `layer.host[name].seen` is what was noted of its inputs.
            name (`str`): the adapter.
            values (`torch.Tensor`, *optional*): new values of the weights that stay: float, shape (out, in).
        """

    def final(self, layer: Any, name: str, mask: torch.Tensor) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
        """What the config records of the update, and buffers by kind that take the place of what was trained.

        Raises:
            ValueError: something that was trained cannot be stored.
        """
        return {}, {}

    def check_stored(self, layer: Any, name: str, kind: str, found: torch.Tensor) -> None:
        """Raise `MaskFormatError` if a tensor of a file has the right shape and values that cannot be."""

    def kept_when_final(self) -> tuple[str, ...]:
        """Kinds of trained tensors that a final adapter still holds."""
        return ()


class Keep(Update):
    """Weights stay as they are."""
