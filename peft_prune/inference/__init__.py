"""Sparse kernels for pruned models. They look at a plain model from outside; nothing else here knows of them."""

from .convert import use_dense_kernels, use_sparse_kernels
from .report import LayerForm, SparseReport
from .sparse_linear import SparseLinear


__all__ = ["LayerForm", "SparseLinear", "SparseReport", "use_dense_kernels", "use_sparse_kernels"]
