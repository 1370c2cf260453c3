"""Exact top-k selection: exactly `k` entries, and the same ones on every run, device and rank."""

from __future__ import annotations

import torch


# Odd, so multiplying by it modulo 2**32 is a bijection; close to 2**32 / golden ratio, so neighbours land far apart.
_SCRAMBLE = 2654435761


def tie_order(indices: torch.Tensor) -> torch.Tensor:
    """Rank by which equal scores are told apart: lower goes first.

    Scores start as ties and stay full of them for the first steps. Breaking ties by plain position would prune whole
    rows then, so positions are scrambled by a fixed bijection of the 32-bit integers.

    Args:
        indices (`torch.Tensor`): flat positions, int64, any shape, below 2**32.

    Returns:
        `torch.Tensor`: int64, the same shape, distinct for distinct positions.
    """
    return (indices * _SCRAMBLE) & 0xFFFFFFFF


def topk_mask(scores: torch.Tensor, k: int) -> torch.Tensor:
    """Mask of the `k` largest scores, ties broken by [`tie_order`].

    Args:
        scores (`torch.Tensor`): floating point, any shape.
        k (`int`): how many entries to keep, from 0 to `scores.numel()`.

    Returns:
        `torch.Tensor`: bool, the shape of `scores`, exactly `k` entries `True`.

    Raises:
        ValueError: `k` is out of range, or the scores hold NaN.
    """
    n = scores.numel()
    if not 0 <= k <= n:
        raise ValueError(f"k={k} must lie between 0 and the number of scores, {n}.")
    if k == n:
        return torch.ones_like(scores, dtype=torch.bool)
    if k == 0:
        return torch.zeros_like(scores, dtype=torch.bool)
    flat = scores.detach().reshape(-1)
    threshold = torch.kthvalue(flat, n - k + 1).values
    mask = flat > threshold
    tied = flat == threshold
    missing = k - int(mask.sum())
    n_tied = int(tied.sum())
    if n_tied < missing:
        raise ValueError(
            "The scores hold NaN, so they cannot be ranked. Training has diverged: lower the score learning rate or "
            "clip gradients."
        )
    if n_tied > missing:
        positions = tied.nonzero().squeeze(1)
        order = tie_order(positions).argsort()
        mask[positions[order[:missing]]] = True
    else:
        mask |= tied
    return mask.view(scores.shape)


def n_m_mask(scores: torch.Tensor, n: int, m: int) -> torch.Tensor:
    """Mask that keeps the `n` largest of every `m` consecutive scores of a row; of equal ones the first.

    Args:
        scores (`torch.Tensor`): floating point, shape (out, in), `in` divisible by `m`.
        n (`int`): entries kept per group, from 0 to `m`.
        m (`int`): size of a group.

    Returns:
        `torch.Tensor`: bool, shape (out, in), exactly `n` of every `m` entries of a row `True`.
    """
    groups = scores.detach().reshape(-1, m)
    if bool(torch.isnan(groups).any()):
        raise ValueError(
            "The scores hold NaN, so they cannot be ranked. Training has diverged: lower the score learning rate or "
            "clip gradients."
        )
    order = groups.argsort(dim=1, descending=True, stable=True)[:, :n]
    mask = torch.zeros_like(groups, dtype=torch.bool).scatter_(1, order, True)
    return mask.view(scores.shape)
