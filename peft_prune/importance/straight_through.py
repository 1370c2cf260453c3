"""The straight-through estimator: a masked weight whose scores receive a gradient."""

from __future__ import annotations

from typing import Any, Optional

import torch

from ..selection.granularity import pool
from .penalty import sigmoid_penalty_grad


def masked(matrix: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """`matrix ⊙ mask`: the dtype of `matrix`; `mask` is bool, of the same shape."""
    # on a CPU a product with bytes is vectorised, and takes half the time of one with bools
    return matrix * mask.view(torch.uint8)


def score_gradient(
    grad: torch.Tensor,
    matrix: torch.Tensor,
    dtype: torch.dtype,
    block: tuple[int, int],
    penalty: Optional[tuple[torch.Tensor, torch.Tensor]],
) -> torch.Tensor:
    """`∂L/∂Ŵ ⊙ W`, summed over blocks, and the gradient of the penalty where there is one.

    Args:
        grad (`torch.Tensor`): `∂L/∂Ŵ`, shape (out, in); overwritten.
        matrix (`torch.Tensor`): `W`, shape (out, in).
        dtype (`torch.dtype`): that of the scores.
        block (`tuple[int, int]`): rows and columns that share a score.
        penalty (`tuple`, *optional*): the scores, and the factor (0-dim) of `σ'(S)`.

    Returns:
        `torch.Tensor`: `dtype`, shape (out / rows, in / columns).
    """
    result = pool(grad.to(dtype).mul_(matrix), block)
    return result if penalty is None else result.add_(sigmoid_penalty_grad(*penalty))


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
        return masked(weight, mask)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[Optional[torch.Tensor], ...]:  # type: ignore[override]
        """Gradients of scores and weight; none of mask and penalty."""
        weight, mask = ctx.saved_tensors
        grad_scores = grad_weight = None
        if ctx.needs_input_grad[0]:
            grad_scores = score_gradient(grad.clone(), weight, ctx.scores_dtype, ctx.block, ctx.penalty)
        if ctx.needs_input_grad[1]:
            grad_weight = masked(grad, mask)
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
