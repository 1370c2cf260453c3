"""A sparse weight as CSR, and its product with rows of activations.

`torch` multiplies a CSR matrix from the left, so the product is that of the transposed activations, and its result is
transposed back. Indices are 32-bit, which MKL takes as they are (64-bit ones are converted in every call).
"""

from __future__ import annotations

import warnings
from typing import Any, Optional

import torch
from torch import nn


# What MKL multiplies. `torch` has no CSR product of half precision on CPU.
CPU_DTYPES = (torch.float32, torch.float64)


def as_csr(crow: torch.Tensor, col: torch.Tensor, values: torch.Tensor, shape: tuple[int, int]) -> torch.Tensor:
    """The matrix that shares the memory of its parts."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Sparse CSR tensor support is in beta")
        return torch.sparse_csr_tensor(crow, col, values, size=shape, check_invariants=False)


def product(matrix: torch.Tensor, x: torch.Tensor, rows_at_once: Optional[int]) -> torch.Tensor:
    """(n, in) activations times the transposed CSR matrix, as (n, out)."""
    rows = x.shape[0]
    if rows == 1:
        return torch.mv(matrix, x[0])[None]  # twice as fast as a product with one column
    if rows_at_once is None or rows <= rows_at_once:
        return torch.mm(matrix, x.T).T
    out = x.new_empty(rows, matrix.shape[0])
    for start in range(0, rows, rows_at_once):
        out[start : start + rows_at_once] = torch.mm(matrix, x[start : start + rows_at_once].T).T
    return out


def dense_from_csr(
    crow: torch.Tensor, col: torch.Tensor, values: torch.Tensor, out_features: int, in_features: int
) -> torch.Tensor:
    """The (out, in) matrix, by plain tensor operations, which every dtype and `torch.compile` have."""
    counts = (crow[1:] - crow[:-1]).long()
    rows = torch.arange(out_features, device=col.device).repeat_interleave(counts, output_size=col.shape[0])
    flat = values.new_zeros(out_features * in_features)
    return flat.index_put((rows * in_features + col,), values).view(out_features, in_features)


@torch.library.custom_op("peft_prune::csr_product", mutates_args=())
def csr_product(
    x: torch.Tensor,
    crow: torch.Tensor,
    col: torch.Tensor,
    values: torch.Tensor,
    out_features: int,
    rows_at_once: Optional[int],
) -> torch.Tensor:
    """[`product`] as one operator that `torch.compile` keeps whole, and that has a gradient for `x`."""
    matrix = as_csr(crow, col, values, (out_features, x.shape[1]))
    return product(matrix, x.detach(), rows_at_once).contiguous()


@csr_product.register_fake
def _csr_product_shape(
    x: torch.Tensor, crow: Any, col: Any, values: Any, out_features: int, rows_at_once: Any
) -> torch.Tensor:
    return x.new_empty(x.shape[0], out_features)


def _keep_parts(ctx: Any, inputs: Any, output: Any) -> None:
    x, crow, col, values, out_features, _ = inputs
    ctx.save_for_backward(crow, col, values)
    ctx.shape = (out_features, x.shape[1])


def _csr_product_backward(ctx: Any, grad: torch.Tensor) -> tuple[Optional[torch.Tensor], ...]:
    return grad @ dense_from_csr(*ctx.saved_tensors, *ctx.shape), None, None, None, None, None


csr_product.register_autograd(_csr_product_backward, setup_context=_keep_parts)


class CSRKernel(nn.Module):
    """
    An (out, in) matrix as CSR.

    Args:
        weight (`torch.Tensor` of shape (out, in)): its zeros are left out.
        rows_at_once (`int`, *optional*): multiply so many rows of activations at a time, which then stay in the cache;
            by default all.
    """

    crow: torch.Tensor
    col: torch.Tensor
    values: torch.Tensor

    def __init__(self, weight: torch.Tensor, rows_at_once: Optional[int] = None) -> None:
        super().__init__()
        self.rows_at_once = rows_at_once
        for name in ("crow", "col", "values"):
            self.register_buffer(name, None, persistent=False)
        self.set_dense(weight)

    @property
    def form(self) -> str:
        """Name in reports."""
        return "csr" if self.rows_at_once is None else f"csr/{self.rows_at_once}"

    def set_dense(self, weight: torch.Tensor) -> None:
        """Take the nonzero entries of another matrix."""
        weight = weight.detach()
        mask = weight != 0
        counts = mask.sum(1).cumsum(0)
        self.shape = (weight.shape[0], weight.shape[1])
        self.crow = torch.cat([counts.new_zeros(1), counts]).int()
        self.col = mask.nonzero()[:, 1].int()
        self.values = weight[mask]
        self._matrix: Optional[torch.Tensor] = None

    def dense(self) -> torch.Tensor:
        """The (out, in) matrix."""
        return dense_from_csr(self.crow, self.col, self.values, *self.shape)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(n, in) to (n, out)."""
        if x.device.type == "cpu" and self.values.dtype not in CPU_DTYPES:
            raise TypeError(
                f"A sparse layer in {self.values.dtype} on CPU: torch has no CSR product for it. "
                "Call `use_dense_kernels(model)`, or keep the model in float32."
            )
        if torch.compiler.is_compiling() or (torch.is_grad_enabled() and x.requires_grad):
            return csr_product(x, self.crow, self.col, self.values, self.shape[0], self.rows_at_once)
        if self._matrix is None:
            self._matrix = as_csr(self.crow, self.col, self.values, self.shape)
        return product(self._matrix, x, self.rows_at_once)

    def _apply(self, *args: Any, **kwargs: Any) -> CSRKernel:
        self._matrix = None
        return super()._apply(*args, **kwargs)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_matrix": None}  # it shares memory with the buffers; a copy is rebuilt
