"""Which weights of each row stay: a share of the row, or n of every m."""

from __future__ import annotations

from typing import Any

import torch

from ..selection.rows import count_in_row
from ..selection.topk import largest_in_rows, n_m_mask


Pattern = float | tuple[int, int]  # a sparsity in [0, 1), or (n, m): n of every m weights along a row stay


def check_pattern(pattern: Any, columns: int) -> None:
    """Raise `ValueError` unless a pattern is a sparsity in [0, 1), or (n, m) that divides rows of `columns` weights."""
    if isinstance(pattern, tuple):
        check_groups(pattern, columns)
    elif isinstance(pattern, bool) or not isinstance(pattern, (int, float)) or not 0 <= pattern < 1:
        raise ValueError(f"pattern={pattern!r} must be a sparsity in [0, 1), or a tuple (n, m) such as (2, 4).")


def check_groups(groups: tuple[int, int], columns: int) -> None:
    """Raise `ValueError` unless `groups` is (n, m) with 1 ≤ n < m, and m divides rows of `columns` weights."""
    whole = len(groups) == 2 and all(isinstance(g, int) and not isinstance(g, bool) for g in groups)
    if not whole or not 1 <= groups[0] < groups[1]:
        raise ValueError(f"(n, m)={groups!r} must be two whole numbers with 1 ≤ n < m, such as (2, 4).")
    if columns % groups[1]:
        raise ValueError(f"(n, m)={groups!r} needs an input width divisible by {groups[1]}, but it is {columns}.")


def kept_in_row(sparsity: float, columns: int) -> int:
    """How many weights of a row stay: one at least."""
    return count_in_row(1.0 - sparsity, columns)


def choose(scores: torch.Tensor, pattern: Pattern) -> torch.Tensor:
    """Mask of the largest scores of each row, or of each group of a row.

    Args:
        scores (`torch.Tensor`): floating point, finite, shape (out, in).
        pattern: a sparsity, or (n, m).

    Returns:
        `torch.Tensor`: bool, shape (out, in), the same number in each row or group.
    """
    if isinstance(pattern, tuple):
        return n_m_mask(scores, *pattern)
    return largest_in_rows(scores, kept_in_row(pattern, scores.shape[1]))
