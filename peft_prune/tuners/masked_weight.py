"""The straight-through estimator: a masked weight whose scores receive a gradient."""

from __future__ import annotations

from typing import Any, Optional

import torch

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
    ) -> torch.Tensor:
        """Mask a weight.

        Args:
            ctx: autograd's context.
            scores (`torch.Tensor`): floating point, shape (out, in); only receives a gradient.
            weight (`torch.Tensor`): floating point, shape (out, in).
            mask (`torch.Tensor`): bool, shape (out, in).
            penalty (`torch.Tensor`, *optional*): 0-dim, the factor of `σ'(S)` in the gradient of the scores.

        Returns:
            `torch.Tensor`: the dtype of `weight`, shape (out, in).
        """
        ctx.save_for_backward(weight, mask if ctx.needs_input_grad[1] else None)
        # Not among the saved tensors: activation checkpointing replaces those by recomputed ones, and the second
        # forward pass of a step has no penalty. Both are leaves, so nothing leaks.
        ctx.penalty = penalty if penalty is None else (scores, penalty)
        ctx.scores_dtype = scores.dtype
        return weight * mask

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[Optional[torch.Tensor], ...]:  # type: ignore[override]
        """Gradients of scores and weight; none of mask and penalty."""
        weight, mask = ctx.saved_tensors
        grad_scores = grad_weight = None
        if ctx.needs_input_grad[0]:
            grad_scores = (grad * weight).to(ctx.scores_dtype)
            if ctx.penalty is not None:
                grad_scores += sigmoid_penalty_grad(*ctx.penalty)
        if ctx.needs_input_grad[1]:
            grad_weight = grad * mask
        return grad_scores, grad_weight, None, None
