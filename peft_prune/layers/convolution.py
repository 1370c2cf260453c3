"""Convolutions seen through a mask, as the matrices (out, in / groups · kernel) that they multiply patches by."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import nn

from .layer import PruningLayer


class PrunedConvolution(PruningLayer):
    """A convolution: a row of its matrix is an output channel, and holds a whole kernel for each input channel."""

    def _as_matrix(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor.reshape(self.weight.shape) if tensor.dim() == 2 else tensor.flatten(1)

    def _apply_weight(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return cast(Any, self.get_base_layer())._conv_forward(x, weight, self.bias)  # knows stride, padding, groups


class PrunedConv1d(PrunedConvolution):
    """`nn.Conv1d` seen through a mask."""


class PrunedConv2d(PrunedConvolution):
    """`nn.Conv2d` seen through a mask."""


class PrunedConv3d(PrunedConvolution):
    """`nn.Conv3d` seen through a mask."""


CONVOLUTIONS: dict[type[nn.Module], type[PruningLayer]] = {
    nn.Conv1d: PrunedConv1d,
    nn.Conv2d: PrunedConv2d,
    nn.Conv3d: PrunedConv3d,
}
