"""Divergence of two distributions over a vocabulary, a few tokens at a time, so that no copy of all logits is made."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F


_AT_ONCE = 1 << 22  # logits; 16 MiB for each intermediate result


def token_divergence(
    student: torch.Tensor,
    teacher: torch.Tensor,
    weights: torch.Tensor,
    temperature: float,
    overwrite_teacher: bool = False,
) -> torch.Tensor:
    """`Σ_i w_i · τ² · KL(teacher_i/τ ‖ student_i/τ)` over tokens i, computed in float32 (Hinton et al. 2015).

    Tokens with a weight of 0 cost nothing. What is kept for the backward pass is the gradient itself, in one tensor of
    the size of the logits; with `overwrite_teacher` it takes the teacher's place.

    Args:
        student (`torch.Tensor`): logits, floating point, shape (..., vocabulary).
        teacher (`torch.Tensor`): logits of the same shape, without gradient.
        weights (`torch.Tensor`): float, the shape without the last dimension.
        temperature (`float`): τ, positive.
        overwrite_teacher (`bool`): whether `teacher` is needed no longer. Ignored if it is float16 or of another dtype.

    Returns:
        `torch.Tensor`: float32, 0-dim.
    """
    vocabulary = student.shape[-1]
    flat = student.reshape(-1, vocabulary), teacher.detach().reshape(-1, vocabulary)
    return _TokenDivergence.apply(*flat, weights.reshape(-1).float(), temperature, overwrite_teacher)


class _TokenDivergence(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, student: torch.Tensor, teacher: torch.Tensor, weights: torch.Tensor, temperature: float, reuse: bool
    ) -> torch.Tensor:
        """See [`token_divergence`]; logits are (tokens, vocabulary), weights (tokens,)."""
        wanted = ctx.needs_input_grad[0]
        # weighed and scaled only in the backward pass: float16 would round the products to 0
        dtype = torch.float32 if student.dtype == torch.float16 else student.dtype
        gradient = None
        if wanted:
            gradient = teacher if reuse and teacher.dtype == dtype else torch.empty_like(student, dtype=dtype)
        counted = weights.nonzero().flatten()
        total = weights.new_zeros(())
        for tokens in counted.split(max(1, _AT_ONCE // student.shape[1])):
            ours = F.log_softmax(student[tokens].float() / temperature, dim=-1)
            theirs = F.log_softmax(teacher[tokens].float() / temperature, dim=-1)
            share = theirs.exp()
            rows = (theirs.sub_(ours).mul_(share)).sum(-1)
            total += (rows * weights[tokens]).sum() * temperature**2
            if gradient is not None:
                gradient[tokens] = ours.exp_().sub_(share).mul_(temperature).to(dtype)
        if gradient is not None:
            if len(counted) < len(weights):
                gradient[weights == 0] = 0
            ctx.save_for_backward(gradient, weights)
            ctx.dtype = student.dtype
        return total

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[Any, ...]:  # type: ignore[override]
        """`w·τ·(softmax(student/τ) − softmax(teacher/τ))`."""
        gradient, weights = ctx.saved_tensors
        # in place: a second backward pass would find it changed, and autograd says so
        return gradient.mul_((weights * grad)[:, None]).to(ctx.dtype), None, None, None, None
