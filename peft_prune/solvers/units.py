"""Whole units of a matrix, heads or neurons: in which order to remove them, and how the others make up for it.

A unit is a group of columns of the matrix that it feeds. Its loss is that of Optimal Brain Surgeon for groups, as in
ZipLM (Kurtić et al. 2023, arXiv 2302.04089, eq. 1) and SlimGPT (Ling et al. 2024, arXiv 2412.18110); the repair is the
least squares of GRAIL (arXiv 2602.23795), shrunk towards the old weights.
"""

from __future__ import annotations

from typing import Optional

import torch

from .checks import check_finite, check_problem, check_whole
from .gram import cholesky, damped


_ROUNDS = 100  # of removal: 16 of 1,536 neurons at a time choose as well as one at a time
_DENSE_ENOUGH = 0.8  # share of units left below which matrices are made smaller


def removal_order(
    weight: torch.Tensor,
    gram: torch.Tensor,
    groups: torch.Tensor,
    count: Optional[int] = None,
    damping: float = 0.01,
    step: Optional[int] = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Remove again and again the units whose loss is least when the others make up for it.

    With the damped matrix H, removing the columns J of a unit costs `e = tr(W_J ([H⁻¹]_JJ)⁻¹ W_Jᵀ)`. Then
    `W ← W − W_J ([H⁻¹]_JJ)⁻¹ [H⁻¹]_J:` and `H⁻¹ ← H⁻¹ − [H⁻¹]_:J ([H⁻¹]_JJ)⁻¹ [H⁻¹]_J:`. The losses of all rounds so
    far add up to the loss of the best weights for what is left, damping included.

    Args:
        weight (`torch.Tensor`): W, floating point, shape (out, in).
        gram (`torch.Tensor`): G, float32 or float64, shape (in, in); its dtype is that of the arithmetic.
        groups (`torch.Tensor`): int64, shape (units, columns of a unit): the columns of each.
        count (`int`, *optional*): units to remove, by default all but one.
        damping (`float`): of the Gram matrix, see [`damped`].
        step (`int`, *optional*): units removed at a time, by default a hundredth of them.

    Returns:
        `tuple[torch.Tensor, torch.Tensor]`: the units in the order in which they go (int64), and what each costs (dtype
        of `gram`), both of shape (count,). Units that go together share their loss equally.

    Raises:
        ValueError: an argument is out of range, shapes do not fit, or a tensor is not finite.
    """
    units, count, step = _check(weight, gram, groups, count, step)
    w, inverse = weight.detach().to(gram).clone(), torch.cholesky_inverse(cholesky(damped(gram, damping)))
    groups = groups.to(gram.device)
    names = torch.arange(units, device=gram.device)  # of the units that the matrices still hold
    alive = torch.ones(units, dtype=torch.bool, device=gram.device)
    order, losses = [], []
    while count:
        scores = _losses(w, inverse, groups).masked_fill_(~alive, float("inf"))
        chosen = scores.topk(min(step, count), largest=False).indices
        order.append(names[chosen])
        losses.append(_remove(w, inverse, groups[chosen].flatten()).expand(len(chosen)) / len(chosen))
        alive[chosen] = False
        count -= len(chosen)
        if count and int(alive.sum()) < _DENSE_ENOUGH * len(alive):
            w, inverse, groups = _without_holes(w, inverse, groups, alive)
            names, alive = names[alive], alive[alive]
    if not order:
        return groups.new_zeros(0), gram.new_zeros(0)
    return torch.cat(order), torch.cat(losses)


def _without_holes(
    w: torch.Tensor, inverse: torch.Tensor, groups: torch.Tensor, alive: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The same problem without the columns of units that are gone; columns of no unit stay."""
    stays = torch.ones(len(inverse), dtype=torch.bool, device=inverse.device)
    stays[groups[~alive].flatten()] = False
    return w[:, stays], inverse[stays][:, stays], (stays.cumsum(0) - 1)[groups[alive]]


def _losses(w: torch.Tensor, inverse: torch.Tensor, groups: torch.Tensor) -> torch.Tensor:
    """What removing each unit costs: shape (units,). Those that are gone give rubbish."""
    if groups.shape[1] == 1:
        columns = groups[:, 0]
        return w.square().sum(0)[columns] / inverse.diagonal()[columns].clamp_min(torch.finfo(inverse.dtype).tiny)
    blocks = inverse[groups[:, :, None], groups[:, None, :]]  # (units, width, width)
    squares = (w.T @ w)[groups[:, :, None], groups[:, None, :]]
    return torch.linalg.solve_ex(blocks, squares).result.diagonal(dim1=1, dim2=2).sum(1).nan_to_num_(float("inf"))


def _remove(w: torch.Tensor, inverse: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
    """Take columns out of the problem, in place; what that costs: 0-dim."""
    factor = cholesky(inverse[columns][:, columns])
    scaled = torch.linalg.solve_triangular(factor, inverse[columns], upper=False)  # L⁻¹ [H⁻¹]_J:
    share = torch.linalg.solve_triangular(factor, w[:, columns].T, upper=False)  # L⁻¹ W_Jᵀ
    w.addmm_(share.T, scaled, alpha=-1)
    inverse.addmm_(scaled.T, scaled, alpha=-1)
    w[:, columns] = 0
    inverse[columns] = 0
    inverse[:, columns] = 0
    inverse.diagonal()[columns] = 1  # so that what is gone stays solvable
    return share.square().sum()


def unit_losses(weight: torch.Tensor, gram: torch.Tensor, groups: torch.Tensor) -> torch.Tensor:
    """`Σ_j ‖W_j‖² G_jj` over the columns of each unit: dtype of `gram`, shape (units,). Arguments as above."""
    _check(weight, gram, groups, None, None)
    columns = weight.detach().to(gram).square().sum(0) * gram.diagonal()
    return columns[groups.to(gram.device)].sum(1)


def order_without_repair(
    weight: torch.Tensor, gram: torch.Tensor, groups: torch.Tensor, count: Optional[int] = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Remove again and again the unit whose loss is least when the weights of the others stay as they are.

    The loss of removing the columns R is `tr(W_R G_RR W_Rᵀ)`, so that of one more unit J is
    `tr(W_J G_JJ W_Jᵀ) + 2 tr(W_R G_RJ W_Jᵀ)`. Arguments, returns and errors are those of [`removal_order`].
    """
    units, count, _ = _check(weight, gram, groups, count, 1)
    w = weight.detach().to(gram)
    groups = groups.to(gram.device)
    # with B = (WᵀW) ⊙ G pooled to units, the loss of a set of units is the sum of its entries of B
    pairs = (w.T @ w).mul_(gram)
    pairs = pairs[groups.flatten()][:, groups.flatten()]
    width = groups.shape[1]
    pairs = pairs.view(units, width, units, width).sum((1, 3))
    added = pairs.diagonal().clone()
    order, losses = [], []
    for _ in range(count):
        unit = int(added.argmin())
        order.append(unit)
        losses.append(added[unit].clone())
        added += 2 * pairs[unit]
        added[unit] = float("inf")
    if not order:
        return groups.new_zeros(0), gram.new_zeros(0)
    return torch.tensor(order, device=gram.device), torch.stack(losses)


def repair(weight: torch.Tensor, gram: torch.Tensor, kept: torch.Tensor, damping: float = 0.01) -> torch.Tensor:
    """The weights of the columns that stay which change the output least: `W' = W_K + W_R G_RK (G_KK + λI)⁻¹`.

    Of all W' this has the least `tr((W' − W) G (W' − W)ᵀ) + λ ‖W' − W_K‖²`, with λ a share of the mean of G's diagonal:
    it is shrunk towards the weights as they were, and not towards 0.

    Args:
        weight (`torch.Tensor`): W, floating point, shape (out, in).
        gram (`torch.Tensor`): G, float32 or float64, shape (in, in); its dtype is that of the arithmetic.
        kept (`torch.Tensor`): bool, shape (in,): the columns that stay.
        damping (`float`): λ as a share, see [`damped`].

    Returns:
        `torch.Tensor`: dtype of `gram`, shape (out, in), zero in the columns that are removed.

    Raises:
        ValueError: shapes do not fit, a tensor is not finite, or the problem has no unique solution.
    """
    check_problem(weight, gram)
    if kept.dtype != torch.bool or kept.shape != gram.shape[:1]:
        raise ValueError(f"kept must be bool of shape ({len(gram)},), but is {kept.dtype} of {tuple(kept.shape)}.")
    w, kept = weight.detach().to(gram), kept.to(gram.device)
    result = w * kept
    if bool(kept.all()) or not bool(kept.any()):
        return result
    left = damped(gram, damping)[kept][:, kept]
    lost = w[:, ~kept] @ gram[~kept][:, kept]
    result[:, kept] += torch.cholesky_solve(lost.T, cholesky(left)).T
    return result


def _check(
    weight: torch.Tensor, gram: torch.Tensor, groups: torch.Tensor, count: Optional[int], step: Optional[int]
) -> tuple[int, int, int]:
    check_problem(weight, gram)
    check_finite("gram", gram)
    if groups.dim() != 2 or groups.dtype != torch.int64 or not groups.numel():
        raise ValueError(f"groups must be int64 of shape (units, columns), but is {groups.dtype} {groups.shape}.")
    if not 0 <= int(groups.min()) <= int(groups.max()) < len(gram) or len(groups.unique()) != groups.numel():
        raise ValueError(f"groups must name columns from 0 to {len(gram) - 1}, each once.")
    units = len(groups)
    count = units - 1 if count is None else count
    check_whole("count", count, 0)
    if count >= units:
        raise ValueError(f"count={count} must be less than the {units} units: at least one is kept.")
    step = max(1, -(-units // _ROUNDS)) if step is None else step
    check_whole("step", step, 1)
    return units, count, step
