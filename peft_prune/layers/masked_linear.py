"""A linear layer through a mask, that keeps neither the mask nor the masked weight for its backward pass."""

from __future__ import annotations

from typing import Any, Optional

import torch
import torch.nn.functional as F

from ..importance.straight_through import score_gradient
from ..storage.bits import masked_by_bits


class MaskedLinear(torch.autograd.Function):
    """`y = x·((W + U) ⊙ M)ᵀ + b`, with the gradients of [`MaskedWeight`] for scores and update.

    The masked weight is made again in the backward pass: a multiplication for each weight, where keeping it from the
    forward pass would cost the memory of a second model. The mask belongs to the layer, which holds its bits in any
    case.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        scores: Optional[torch.Tensor],
        update: Optional[torch.Tensor],
        weight: torch.Tensor,
        bias: Optional[torch.Tensor],
        bits: torch.Tensor,
        penalty: Optional[torch.Tensor],
        block: tuple[int, int] = (1, 1),
        apart: bool = False,
    ) -> torch.Tensor:
        """Apply a masked weight.

        Args:
            ctx: autograd's context.
            x (`torch.Tensor`): floating point, shape (..., in).
            scores (`torch.Tensor`, *optional*): shape (out / rows, in / columns); only receives a gradient.
            update (`torch.Tensor`, *optional*): trained change of the weight, shape (out, in).
            weight (`torch.Tensor`): frozen, shape (out, in).
            bias (`torch.Tensor`, *optional*): shape (out,); frozen or trained.
            bits (`torch.Tensor`): the mask as [`pack_bits`] packs it.
            penalty (`torch.Tensor`, *optional*): 0-dim, the factor of `σ'(S)` in the gradient of the scores.
            block (`tuple[int, int]`): rows and columns that share a score.
            apart (`bool`): whether the update is multiplied by itself where a product is less precise than float32. The
                sum with the weight would be rounded to the weight as it was as long as the update is small.

        Returns:
            `torch.Tensor`: shape (..., out), in the dtype that autocast asks for, otherwise that of `x`.
        """
        device = x.device.type
        if torch.is_autocast_enabled(device):
            x = x.to(torch.get_autocast_dtype(device))
        ctx.apart = apart and update is not None and x.dtype.itemsize < 4
        ctx.save_for_backward(x, weight, update, bits)
        # see MaskedWeight for why these are not among the saved tensors
        ctx.penalty = penalty if penalty is None else (scores, penalty)
        ctx.scores_dtype, ctx.block = None if scores is None else scores.dtype, block
        ctx.bias_dtype = None if bias is None else bias.dtype
        with torch.autocast(device, enabled=False):
            first, *rest = _masked(weight, update, bits, x.dtype, ctx.apart)
            result = F.linear(x, first, None if bias is None else bias.to(x.dtype))
            for part in rest:
                result += F.linear(x, part)
            return result

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[Optional[torch.Tensor], ...]:  # type: ignore[override]
        """Gradients of input, scores, update and bias."""
        x, weight, update, bits = ctx.saved_tensors
        grad_x = grad_scores = grad_update = grad_bias = None
        if ctx.needs_input_grad[0]:
            first, *rest = _masked(weight, update, bits, grad.dtype, ctx.apart)
            grad_x = grad @ first
            for part in rest:
                grad_x += grad @ part
        flat = grad.reshape(-1, grad.shape[-1])
        if ctx.needs_input_grad[1] or ctx.needs_input_grad[2]:
            dense = flat.T @ x.reshape(-1, x.shape[-1])
            if ctx.needs_input_grad[2]:
                grad_update = masked_by_bits(dense.to(update.dtype), bits)
            if ctx.needs_input_grad[1]:
                grad_scores = score_gradient(dense, _sum(weight, update), ctx.scores_dtype, ctx.block, ctx.penalty)
        if ctx.needs_input_grad[4]:
            grad_bias = flat.sum(0).to(ctx.bias_dtype)
        return grad_x, grad_scores, grad_update, None, grad_bias, None, None, None, None


def _masked(
    weight: torch.Tensor, update: Optional[torch.Tensor], bits: torch.Tensor, dtype: torch.dtype, apart: bool
) -> list[torch.Tensor]:
    """The masked matrices whose products are added up: one, or if `apart` the weight and the update."""
    parts = [weight, update] if apart and update is not None else [_sum(weight, update)]
    return [masked_by_bits(part, bits).to(dtype) for part in parts]


def _sum(weight: torch.Tensor, update: Optional[torch.Tensor]) -> torch.Tensor:
    return weight if update is None else (weight + update).to(weight.dtype)
