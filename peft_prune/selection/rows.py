"""Top-k of each row: exactly `k` entries of every row, and the same ones on every run, device and rank."""

from __future__ import annotations

import functools

import torch

from .device import on_cpu
from .topk import check_ranked, rows_by_partition, tie_order


_BITS = 32  # of a float32
_LOWEST = -(1 << 31)


def count_in_row(density: float, columns: int) -> int:
    """Entries that a row of `columns` keeps at `density`: one at least."""
    return max(1, round(density * columns))


def row_topk_mask(scores: torch.Tensor, k: int) -> torch.Tensor:
    """Mask of the `k` largest scores of each row.

    Of equal scores, those go first that come first in a scrambled order of the columns, which begins elsewhere in each
    row. Scores start as ties, and by plain position all rows would keep the same columns. On an accelerator nothing is
    read back, so scores that hold NaN are not noticed there.

    Args:
        scores (`torch.Tensor`): floating point, shape (rows, columns); compared as float32.
        k (`int`): entries kept of each row, from 0 to `columns`.

    Returns:
        `torch.Tensor`: bool, the shape of `scores`, exactly `k` entries of each row `True`.

    Raises:
        ValueError: `k` is out of range, or the scores hold NaN.
    """
    columns = scores.shape[1]
    if not 0 <= k <= columns:
        raise ValueError(f"k={k} must lie between 0 and the number of columns, {columns}.")
    if k in (0, columns):
        return torch.full_like(scores, k == columns, dtype=torch.bool)
    values = scores.detach().float()
    if not on_cpu(values):
        return settle_ties(values, kth_largest(values, k)[:, None], k, torch.arange(len(values), device=values.device))
    check_ranked(values)
    mask, threshold, tied = rows_by_partition(values, k)
    if len(tied):
        mask[tied] = settle_ties(values[tied], threshold[tied, None], k, tied)
    return mask


def kth_largest(values: torch.Tensor, k: int) -> torch.Tensor:
    """The k-th largest of each row, found bit by bit: each time it is counted how many entries have that bit, too.

    No entry is read by the host, and all passes are sums, which are exact.

    Args:
        values (`torch.Tensor`): float32, shape (rows, columns), without NaN.
        k (`int`): from 1 to `columns`.

    Returns:
        `torch.Tensor`: float32, shape (rows,).
    """
    bits = torch.where(values == 0, 0.0, values).view(torch.int32)  # 0 and -0 are equal
    keys = _reversed_if_negative(bits)
    found = torch.full((len(values),), _LOWEST, dtype=torch.int32, device=values.device)
    for bit in range(_BITS - 1, -1, -1):
        tried = found + (1 << bit) if bit < _BITS - 1 else torch.zeros_like(found)
        enough = (keys >= tried[:, None]).sum(1) >= k
        found = torch.where(enough, tried, found)
    return _reversed_if_negative(found).view(torch.float32)


def _reversed_if_negative(bits: torch.Tensor) -> torch.Tensor:
    """The bits of floats as whole numbers (int32) in their order; and back, since it is its own inverse."""
    return torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits)


def settle_ties(values: torch.Tensor, threshold: torch.Tensor, k: int, rows: torch.Tensor) -> torch.Tensor:
    """Mask of what is above the threshold of its row, and of as many equal to it as there is room for.

    Args:
        values (`torch.Tensor`): float, shape (rows, columns).
        threshold (`torch.Tensor`): the k-th largest of each row, shape (rows, 1).
        k (`int`): entries kept of each row.
        rows (`torch.Tensor`): numbers of the rows, int64, shape (rows,).
    """
    above, tied = values > threshold, values == threshold
    room = k - above.sum(1, keepdim=True)
    order, place = _scrambled(values.shape[1], values.device)
    counted = tied[:, order].cumsum(1, dtype=torch.int32)
    # begin after `first`: what was counted up to there comes last
    first = (tie_order(rows) % values.shape[1])[:, None]
    position = counted - counted.gather(1, first)
    position = torch.where(position <= 0, position + counted[:, -1:], position)
    return above | (tied & (position <= room)[:, place])


@functools.lru_cache(maxsize=32)
def _scrambled(columns: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """A scrambled order of columns, and the place of each column in it; both int64."""
    order = tie_order(torch.arange(columns)).argsort()
    return order.to(device), order.argsort().to(device)
