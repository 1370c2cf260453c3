"""An update of low rank that makes up for what pruning did, in closed form."""

from __future__ import annotations

import torch

from .checks import check_finite, check_whole
from .gram import cholesky, damped


def low_rank_error(
    weight: torch.Tensor, values: torch.Tensor, inputs: torch.Tensor, rank: int, damping: float = 0.0
) -> tuple[torch.Tensor, torch.Tensor]:
    """The `B·A` of rank r for which `Ŵ + B·A` comes closest to `W` on the inputs.

    With the squares d of the inputs, SLiM (Mozaffari et al. 2024, arXiv 2410.09615): the truncation of
    `(W − Ŵ)·diag(√d)` to rank r, times `diag(1/√d)`: inputs count by their size. With the whole Gram matrix
    `G = L Lᵀ`, that of `(W − Ŵ)·L`, times `L⁻¹` (QERA, Zhang et al. 2024, arXiv 2410.06040, theorem 1): no update of
    rank r has a smaller loss of the output.

    Args:
        weight (`torch.Tensor`): W, floating point, shape (out, in).
        values (`torch.Tensor`): Ŵ, floating point, the same shape.
        inputs (`torch.Tensor`): squares `d = diag G`, shape (in,), or `G`, shape (in, in); float, not negative.
        rank (`int`): r, from 1 to the smaller side of W.
        damping (`float`): of `G`, see [`damped`]; without a meaning for d.

    Returns:
        `tuple[torch.Tensor, torch.Tensor]`: A, shape (r, in), and B, shape (out, r), both float32, the singular values
        shared out between them: an ordinary LoRA with scaling 1.

    Raises:
        ValueError: shapes do not fit, the rank is out of range, or a tensor is not finite.
    """
    error = (weight.detach().double() - values.detach().double()).to(inputs.device)
    _check(error, inputs, rank)
    if inputs.dim() == 1:
        root = inputs.double().sqrt()
        left, right = _truncated(error * root, rank)
        # an input that was always zero tells nothing
        right = torch.where(root > 0, right / root, torch.zeros_like(right))
    else:
        factor = cholesky(damped(inputs.double(), damping))
        left, right = _truncated(error @ factor, rank)
        right = torch.linalg.solve_triangular(factor, right, upper=False, left=False)
    return right.float(), left.float()


def _check(error: torch.Tensor, inputs: torch.Tensor, rank: int) -> None:
    if tuple(inputs.shape) not in ((error.shape[1],), (error.shape[1],) * 2):
        raise ValueError(
            f"inputs has shape {tuple(inputs.shape)}, but a weight of shape {tuple(error.shape)} (out, in) needs "
            f"(in,) for squares or (in, in) for a Gram matrix."
        )
    check_whole("rank", rank, 1)
    if rank > min(error.shape):
        raise ValueError(f"rank={rank} must not exceed the smaller side of the weight, {min(error.shape)}.")
    check_finite("weight - values", error)
    check_finite("inputs", inputs)
    if bool((inputs if inputs.dim() == 1 else inputs.diagonal()).lt(0).any()):
        raise ValueError("inputs holds negative squares. Give sums of squares, or a Gram matrix.")


def _truncated(matrix: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Factors (rows, rank) and (rank, columns) of the best approximation of that rank, by the smaller Gram matrix."""
    if matrix.shape[0] > matrix.shape[1]:
        right, left = _truncated(matrix.T, rank)
        return left.T, right.T
    vectors = torch.linalg.eigh(matrix @ matrix.T).eigenvectors[:, -rank:]
    projected = vectors.T @ matrix
    sizes = projected.norm(dim=1).clamp(min=1e-300).sqrt()
    return vectors * sizes, projected / sizes[:, None]
