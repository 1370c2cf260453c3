"""Exact top-k for accelerators: digits are counted from the highest down, and the host reads none of the counts.

The number of entries to keep may itself be a tensor, and every operation has an output whose shape is known beforehand,
so nothing waits for the device, and the whole can be compiled or captured in a graph.
"""

from __future__ import annotations

import torch


_DIGIT = 11  # bits; their histogram fits into the shared memory of a GPU's processor
_BINS = 1 << _DIGIT
_SHIFTS = (2 * _DIGIT, _DIGIT, 0)  # of numbers of 32 bits


def radix_topk(scores: torch.Tensor, k: torch.Tensor, ranks: torch.Tensor) -> torch.Tensor:
    """Mask of the `k` largest scores; of equal ones those with the lowest rank go first.

    Args:
        scores (`torch.Tensor`): floating point of at most 32 bits, one dimension. NaN counts as the largest.
        k (`torch.Tensor`): how many to keep, from 0 to `len(scores)`: int64, 0-dim.
        ranks (`torch.Tensor`): int64, from 0 to 2**32 - 1, the shape of `scores`, all different.

    Returns:
        `torch.Tensor`: bool, the shape of `scores`, exactly `k` entries `True`.
    """
    above, tied, missing = _split(_ordered(scores), k)
    first, last, _ = _split(torch.where(tied, 0xFFFFFFFF - ranks, -1), missing)
    return (above | first | last) & (k > 0)


def _ordered(scores: torch.Tensor) -> torch.Tensor:
    """Integers from 0 to 2**32 - 1 in the order of some floats; equal ones for 0 and -0."""
    scores = torch.where(scores == 0, 0.0, scores.float())
    bits = scores.view(torch.int32).long()
    return torch.where(bits < 0, ~bits & 0x7FFFFFFF, bits + 0x80000000)


def _split(keys: torch.Tensor, k: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """What is above the k-th largest key, what is equal to it, and how many of the latter belong to the `k`.

    Keys below 0 are left out. Digit by digit, the largest value is sought that enough keys reach.
    """
    prefix, left = torch.zeros_like(k), k
    for shift in _SHIFTS:
        digits = torch.where(keys >> (shift + _DIGIT) == prefix, (keys >> shift) & (_BINS - 1), _BINS)
        reach = _histogram(digits).flip(0).cumsum(0).flip(0)  # how many have this digit or a larger one
        digit = (reach >= left).sum() - 1
        left = left - torch.where(reach < left, reach, 0).max()  # those with a larger digit are in
        prefix = (prefix << _DIGIT) | digit
    return keys > prefix, keys == prefix, left


def _histogram(digits: torch.Tensor) -> torch.Tensor:
    """How often each digit occurs: int64, shape (bins,)."""
    if digits.is_cuda:  # integers, which are counted exactly and in no order that matters
        # the last bin would take the upper end of the range as well: one more, for what is left out
        return torch.histc(digits.int(), bins=_BINS + 1, min=0, max=_BINS + 1)[:-1].long()
    counts = torch.zeros(_BINS + 1, dtype=torch.int64, device=digits.device)
    return counts.scatter_add_(0, digits, torch.ones_like(digits))[:-1]
