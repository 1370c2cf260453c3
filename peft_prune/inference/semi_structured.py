"""A 2:4 weight in the form of the sparse tensor cores of NVIDIA GPUs (compute capability 8.0 and later)."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn


DTYPES = (torch.float16, torch.bfloat16)


def has_pattern(weight: torch.Tensor) -> bool:
    """Whether no four weights side by side along the inputs hold more than two nonzeros."""
    if weight.shape[1] % 4:
        return False
    return bool(((weight != 0).reshape(-1, 4).sum(1) <= 2).all())


def can_run(weight: torch.Tensor) -> bool:
    """Whether `torch.sparse.to_sparse_semi_structured` may take an (out, in) weight where it lies."""
    if weight.device.type != "cuda" or weight.dtype not in DTYPES or torch.version.hip is not None:
        return False
    return torch.cuda.get_device_capability(weight.device) >= (8, 0) and has_pattern(weight)


class SemiStructuredKernel(nn.Module):
    """
    An (out, in) matrix of the 2:4 pattern, packed.

    Args:
        weight (`torch.Tensor` of shape (out, in)): float16 or bfloat16, on a GPU.
    """

    form = "2:4"

    def __init__(self, weight: torch.Tensor) -> None:
        super().__init__()
        self.set_dense(weight)

    def set_dense(self, weight: torch.Tensor) -> None:
        """Take another matrix; it needs the pattern, which the packed form would otherwise cut it to."""
        weight = weight.detach().contiguous()
        if not can_run(weight):
            raise ValueError(
                f"A 2:4 layer cannot hold a weight in {weight.dtype} on {weight.device} or without the 2:4 pattern. "
                "Call `use_dense_kernels(model)` before you move, cast or load it."
            )
        self.packed = torch.sparse.to_sparse_semi_structured(weight)

    def dense(self) -> torch.Tensor:
        """The (out, in) matrix."""
        return self.packed.to_dense()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(n, in) to (n, out)."""
        return nn.functional.linear(x, self.packed)

    def _apply(self, fn: Any, *args: Any, **kwargs: Any) -> SemiStructuredKernel:
        dense = self.dense()
        moved = fn(dense)
        if moved.dtype != dense.dtype or moved.device != dense.device:
            self.set_dense(moved)
        return self
