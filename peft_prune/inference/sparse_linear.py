"""A linear layer whose weight is held in a sparse form, for inference."""

from __future__ import annotations

from typing import Any, Optional, Union

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from .csr import CSRKernel
from .semi_structured import SemiStructuredKernel


Kernel = Union[CSRKernel, SemiStructuredKernel]


class SparseLinear(nn.Module):
    """
    What [`use_sparse_kernels`] puts in the place of a linear layer.

    The weight is frozen, gradients reach the input only. `weight` and `state_dict` give it dense, as the layer that was
    here has it, and a dense checkpoint can be loaded.

    Args:
        layer (`nn.Linear` or Transformers' `Conv1D`): the layer to stand in for.
        kernel ([`CSRKernel`] or [`SemiStructuredKernel`]): its (out, in) weight.
    """

    def __init__(self, layer: nn.Module, kernel: Kernel) -> None:
        super().__init__()
        self.transposed = isinstance(layer, Conv1D)
        self.out_features, self.in_features = out_in(layer).shape
        if self.transposed:
            self.nf, self.nx = self.out_features, self.in_features
        self.kernel = kernel
        bias: Optional[torch.Tensor] = layer.bias  # type: ignore[assignment]
        self.bias = None if bias is None else nn.Parameter(bias.detach(), requires_grad=False)
        self.train(layer.training)

    @property
    def weight(self) -> torch.Tensor:
        """The dense weight, recomputed in every call: (out, in), or (in, out) for a `Conv1D`."""
        dense = self.kernel.dense()
        return dense.T.contiguous() if self.transposed else dense

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(..., in) to (..., out)."""
        kind = x.device.type
        if torch.is_autocast_enabled(kind):  # there may be no sparse product in the lower precision
            own = self.kernel.values.dtype if isinstance(self.kernel, CSRKernel) else self.kernel.packed.dtype
            with torch.autocast(kind, enabled=False):
                return self._product(x.to(own)).to(torch.get_autocast_dtype(kind))
        return self._product(x)

    def _product(self, x: torch.Tensor) -> torch.Tensor:
        flat = x.reshape(-1, self.in_features)
        out = self.kernel(flat) if flat.shape[0] else flat.new_empty(0, self.out_features)
        if self.bias is not None:
            out = out + self.bias
        # rows lie in order again, so that whatever `view` a dense layer's result takes works here
        return out.contiguous().view(*x.shape[:-1], self.out_features)

    def dense(self) -> nn.Module:
        """The ordinary layer: `nn.Linear` or `Conv1D`."""
        layer: Any
        with torch.device("meta"):
            if self.transposed:
                layer = Conv1D(self.out_features, self.in_features)
            else:
                layer = nn.Linear(self.in_features, self.out_features, bias=self.bias is not None)
        layer.weight = nn.Parameter(self.weight, requires_grad=False)
        layer.bias = self.bias
        return layer.train(self.training)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, form={self.kernel.form}"

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        destination[prefix + "weight"] = self.weight
        super()._save_to_state_dict(destination, prefix, keep_vars)

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, local_metadata: dict[str, Any], strict: bool,
        missing_keys: list[str], unexpected_keys: list[str], error_msgs: list[str],
    ) -> None:  # fmt: skip
        key = prefix + "weight"
        rest = {name: tensor for name, tensor in state_dict.items() if name != key}  # no parameter here has that name
        super()._load_from_state_dict(rest, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs)
        if key not in state_dict:
            if strict:
                missing_keys.append(key)
            return
        own, given = self.weight, state_dict[key]
        if given.shape != own.shape:
            error_msgs.append(f"{key} has shape {tuple(given.shape)}, the sparse layer {tuple(own.shape)}.")
            return
        given = given.to(own)
        self.kernel.set_dense(given.T if self.transposed else given)


def out_in(layer: nn.Module) -> torch.Tensor:
    """The weight of a linear layer as (out, in), whichever way the layer holds it."""
    weight = layer.weight.detach()  # type: ignore[operator, union-attr]
    return weight.T if isinstance(layer, Conv1D) else weight
