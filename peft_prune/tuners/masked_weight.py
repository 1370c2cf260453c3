"""The straight-through estimator: a masked weight whose scores receive a gradient."""

from __future__ import annotations

from typing import Any, Optional

import torch

from ..masks.granularity import pool
from ..masks.penalty import sigmoid_penalty_grad


class MaskedWeight(torch.autograd.Function):
    """`Ŵ = W ⊙ M`, with `∂L/∂S = ∂L/∂Ŵ ⊙ W` straight through the selection and `∂L/∂W = ∂L/∂Ŵ ⊙ M`.

    (Movement pruning, Sanh et al. 2020, section 3; SMP, Jiang et al. 2023, eq. 4.) The gradient of the penalty
    `λ · mean(sigmoid(S))` is known in closed form and added here when `penalty` is given, so that it is counted once an
    optimizer step whatever the loss is divided by.
    """

    @staticmethod
    def forward(
        ctx: Any,
        scores: torch.Tensor,
        weight: torch.Tensor,
        mask: torch.Tensor,
        penalty: Optional[torch.Tensor],
        block: tuple[int, int] = (1, 1),
    ) -> torch.Tensor:
        """Mask a weight.

        Args:
            ctx: autograd's context.
            scores (`torch.Tensor`): floating point, shape (out / rows, in / columns); only receives a gradient.
            weight (`torch.Tensor`): floating point, shape (out, in).
            mask (`torch.Tensor`): bool, shape (out, in).
            penalty (`torch.Tensor`, *optional*): 0-dim, the factor of `σ'(S)` in the gradient of the scores.
            block (`tuple[int, int]`): rows and columns that share a score, whose gradient is their sum.

        Returns:
            `torch.Tensor`: the dtype of `weight`, shape (out, in).
        """
        ctx.save_for_backward(weight, mask if ctx.needs_input_grad[1] else None)
        # Not among the saved tensors: activation checkpointing replaces those by recomputed ones, and the second
        # forward pass of a step has no penalty. Both are leaves, so nothing leaks.
        ctx.penalty = penalty if penalty is None else (scores, penalty)
        ctx.scores_dtype, ctx.block = scores.dtype, block
        return weight * mask

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[Optional[torch.Tensor], ...]:  # type: ignore[override]
        """Gradients of scores and weight; none of mask and penalty."""
        weight, mask = ctx.saved_tensors
        grad_scores = grad_weight = None
        if ctx.needs_input_grad[0]:
            grad_scores = pool((grad * weight).to(ctx.scores_dtype), ctx.block)
            if ctx.penalty is not None:
                grad_scores += sigmoid_penalty_grad(*ctx.penalty)
        if ctx.needs_input_grad[1]:
            grad_weight = grad * mask
        return grad_scores, grad_weight, None, None, None


class Penalized(torch.autograd.Function):
    """Scores as they are, to whose gradient that of the penalty is added."""

    @staticmethod
    def forward(ctx: Any, scores: torch.Tensor, penalty: torch.Tensor, offset: float) -> torch.Tensor:
        """Pass scores on; `penalty` (0-dim) is the factor of `σ'(S - offset)`."""
        ctx.penalty = (scores, penalty, offset)
        return scores.view_as(scores)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[Optional[torch.Tensor], ...]:  # type: ignore[override]
        """Gradient of the scores."""
        return grad + sigmoid_penalty_grad(*ctx.penalty), None, None
