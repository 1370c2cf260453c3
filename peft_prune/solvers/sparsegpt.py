"""SparseGPT (Frantar & Alistarh 2023, arXiv 2301.00774): columns are pruned in order, those to the right make up."""

from __future__ import annotations

import torch

from ..selection.topk import topk_mask
from .checks import check_problem, check_whole
from .gram import cholesky, damped
from .pattern import Pattern, check_pattern, choose


def sparsegpt(
    weight: torch.Tensor, gram: torch.Tensor, pattern: Pattern, damping: float = 0.01, block: int = 128
) -> tuple[torch.Tensor, torch.Tensor]:
    """Algorithm 1 of the paper: a mask and new values, in one pass over the columns.

    With `U` the upper Cholesky factor of `G⁻¹`, the weights of a block of columns with the largest `W²/U_jj²` stay, all
    rows compared (or each group of a row by itself). Then, column by column, the error `(W_j − Ŵ_j)/U_jj · U_j,k` is
    taken from the columns k to the right. `G⁻¹` is never formed: with `G = R Rᵀ`, R upper, `U = R⁻¹`, and a block's
    columns after all errors E to its left are `W − E·R_left,block·U_block`. That takes a third of the operations.

    Args:
        weight (`torch.Tensor`): floating point, shape (out, in).
        gram (`torch.Tensor`): float32 or float64, shape (in, in); its dtype is that of the arithmetic.
        pattern (`float` or `tuple[int, int]`): a sparsity in [0, 1), or (n, m).
        damping (`float`): of the Gram matrix, see [`damped`].
        block (`int`): columns that share a threshold; a multiple of m for a pattern of groups.

    Returns:
        `tuple[torch.Tensor, torch.Tensor]`: the mask (bool) and the values, zero where it is `False` (dtype of `gram`),
        both of shape (out, in). The sparsity of each block, and of the whole, is exact to one weight.

    Raises:
        ValueError: an argument is out of range, shapes do not fit, a tensor is not finite, or the damped Gram matrix
            is not positive definite.
    """
    check_problem(weight, gram)
    check_pattern(pattern, weight.shape[1])
    check_whole("block", block, 1)
    if isinstance(pattern, tuple) and block % pattern[1]:
        raise ValueError(f"block={block} must be a multiple of m for (n, m)={pattern!r}, such as {pattern[1] * 32}.")
    columns = weight.detach().to(gram).T.contiguous()
    factor = upper_factor(damped(gram, damping))
    mask, error = torch.zeros_like(columns, dtype=torch.bool), torch.zeros_like(columns)
    for start in range(0, len(columns), block):
        end = min(start + block, len(columns))
        own = factor[start:end, start:end]
        inverse = torch.linalg.solve_triangular(own, torch.eye(end - start).to(own), upper=True)
        now = columns[start:end] - inverse.T @ (factor[:start, start:end].T @ error[:start])
        chosen = None if isinstance(pattern, tuple) else _by_threshold(now, inverse, pattern, start)
        mask[start:end] = _prune(now, inverse, pattern, chosen)
        error[start:end] = now * mask[start:end] - columns[start:end]
    return mask.T.contiguous(), ((columns + error) * mask).T.contiguous()


def upper_factor(matrix: torch.Tensor) -> torch.Tensor:
    """`R`, upper triangular, with `R Rᵀ` the matrix: shape (in, in)."""
    return cholesky(matrix.flip(0, 1)).flip(0, 1)


def _by_threshold(now: torch.Tensor, inverse: torch.Tensor, sparsity: float, start: int) -> torch.Tensor:
    """The most important weights of a block, bool, (columns, out); rounding does not add up from block to block."""
    before, after = round(sparsity * start * now.shape[1]), round(sparsity * (start + len(now)) * now.shape[1])
    return topk_mask(_importance(now, inverse.diagonal()), now.numel() - (after - before))


def _importance(now: torch.Tensor, diagonal: torch.Tensor) -> torch.Tensor:
    """What removing a weight costs if the columns to its right make up (eq. 3): (columns, out)."""
    return (now / diagonal[:, None]).square()


def _prune(now: torch.Tensor, inverse: torch.Tensor, pattern: Pattern, chosen: torch.Tensor | None) -> torch.Tensor:
    """Choose what stays of a block, and make up in place within it.

    Args:
        now (`torch.Tensor`): columns of the block, as rows: (columns, out). Holds what they were when their turn came
            afterwards; the mask is still to be applied.
        inverse (`torch.Tensor`): `U` of the block, upper triangular.
        pattern: a sparsity, or (n, m).
        chosen (`torch.Tensor`, *optional*): the mask, bool, (columns, out); without, groups choose when their turn
            comes.

    Returns:
        `torch.Tensor`: the mask, bool, (columns, out).
    """
    mask = torch.empty_like(now, dtype=torch.bool) if chosen is None else chosen
    removed = torch.empty_like(now) if chosen is None else (~chosen).to(now)
    diagonal = inverse.diagonal()
    shares = (-inverse / diagonal[:, None]).unbind()  # of a row's error, for each of the rows below
    rows, of_rows = now.unbind(), removed.unbind()
    for j, row in enumerate(rows):
        if chosen is None and isinstance(pattern, tuple) and j % pattern[1] == 0:
            group = slice(j, j + pattern[1])
            mask[group] = choose(_importance(now[group], diagonal[group]).T.contiguous(), pattern).T
            removed[group] = ~mask[group]
        now[j + 1 :].addr_(shares[j][j + 1 :], row * of_rows[j])
    return mask
