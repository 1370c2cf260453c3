"""How large the residual stream is to which layers add their output, on the tokens that are no padding."""

from __future__ import annotations

import torch

from .observers import GramMatrices


class ResidualGrams(GramMatrices):
    """Gram matrices of layers' inputs, and the size of the residual stream at their blocks, see `Observer.streams`."""

    def __init__(self) -> None:
        super().__init__()
        self._squares: dict[str, list[torch.Tensor]] = {}

    def see_stream(self, key: str, decoder: bool, states: torch.Tensor) -> None:
        """Note the mean square of each token."""
        squares = self.real(key, decoder, states).float().square().mean(1)
        self._squares.setdefault(key, []).append(squares.cpu())

    def result(self, key: str) -> tuple[torch.Tensor, float, int]:  # type: ignore[override]
        """Gram matrix; mean square of the residual stream, the median over all tokens; number of tokens."""
        gram = super().result(key)
        squares = torch.cat(self._squares.pop(key))
        return gram, float(squares.median()), len(squares)
