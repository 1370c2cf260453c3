"""Exact top-k selection: exactly `k` entries, and the same ones on every run, device and rank."""

from __future__ import annotations

from typing import Optional

import numpy as np
import torch

from .device import on_cpu
from .radix import radix_topk
from .warm_start import LastThreshold


# Odd, so multiplying by it modulo 2**32 is a bijection; close to 2**32 / golden ratio, so neighbours land far apart.
_SCRAMBLE = 2654435761
_NAN = (
    "The scores hold NaN, so they cannot be ranked. Either training has diverged (lower the score learning rate, or "
    "clip gradients), or base weights that were loaded after the adapter was added hold NaN or infinity."
)

_on_device = radix_topk


def compile_selection(enabled: bool = True) -> None:
    """Compile the selection of the largest scores on accelerators with `torch.compile`, or undo that.

    This gives a few kernels per matrix instead of some hundred small ones. `PruningCallback` does it if
    `TrainingArguments(torch_compile=True)` is set. On a CPU it changes nothing: selection uses NumPy there.

    Raises:
        ValueError: `enabled` is neither `True` nor `False`.
    """
    global _on_device
    if not isinstance(enabled, bool):
        raise ValueError(f"enabled={enabled!r} must be True or False. A model is compiled by torch.compile(model).")
    _on_device = torch.compile(radix_topk, fullgraph=True) if enabled else radix_topk


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


def topk_mask(scores: torch.Tensor, k: int | torch.Tensor, last: Optional[LastThreshold] = None) -> torch.Tensor:
    """Mask of the `k` largest scores, ties broken by [`tie_order`].

    On an accelerator nothing is read back, unless scores are float64: those that hold NaN are not noticed there before
    [`check_ranked`].

    Args:
        scores (`torch.Tensor`): floating point, any shape.
        k (`int` or `torch.Tensor`): how many entries to keep, from 0 to `scores.numel()`; as a tensor int64, 0-dim.
        last ([`LastThreshold`], *optional*): of the last time for this matrix, so that on a CPU few scores need to be
            ranked; brought up to date. The mask does not depend on it.

    Returns:
        `torch.Tensor`: bool, the shape of `scores`, exactly `k` entries `True`.

    Raises:
        ValueError: `k` is out of range, or the scores hold NaN.
    """
    n = scores.numel()
    if isinstance(k, torch.Tensor) and on_cpu(k):
        k = int(k)
    if isinstance(k, int):
        if not 0 <= k <= n:
            raise ValueError(f"k={k} must lie between 0 and the number of scores, {n}.")
        if k in (0, n):
            return torch.full_like(scores, k == n, dtype=torch.bool)
    flat = scores.detach().reshape(-1)
    if not on_cpu(flat) and flat.dtype != torch.float64:  # which has more digits than are counted
        wanted = k if isinstance(k, torch.Tensor) else torch.full((), k, dtype=torch.int64, device=flat.device)
        ranks = tie_order(torch.arange(n, device=flat.device))
        return _on_device(flat, wanted, ranks).view(scores.shape)
    flat = flat.cpu()
    values = (flat if flat.dtype in (torch.float32, torch.float64) else flat.float()).numpy()
    last = last or LastThreshold()
    mask = last.select(values, int(k))
    if mask is None:
        mask = _select_on_cpu(values, int(k), last)
    return torch.from_numpy(mask).view(scores.shape).to(scores.device)


def _select_on_cpu(values: np.ndarray, k: int, last: LastThreshold) -> np.ndarray:
    """By NumPy, whose partition and comparisons are ten times as fast as torch's on a CPU."""
    largest = np.partition(values, len(values) - k)[len(values) - k :]
    threshold = largest[0]
    if np.isnan(largest).any():  # NumPy takes it for the largest of all
        raise ValueError(_NAN)
    mask = values >= threshold
    found = int(np.count_nonzero(mask))
    last.note(float(threshold))
    if found > k:
        tied = np.flatnonzero(values == threshold)
        order = tie_order(torch.from_numpy(tied)).argsort().numpy()
        mask[tied[order[k - found :]]] = False
    return mask


def check_ranked(scores: torch.Tensor) -> None:
    """Raise `ValueError` if scores hold NaN; the host waits for the answer."""
    if bool(torch.isnan(scores).any()):
        raise ValueError(_NAN)


def n_m_mask(scores: torch.Tensor, n: int, m: int) -> torch.Tensor:
    """Mask that keeps the `n` largest of every `m` consecutive scores of a row; of equal ones the first.

    Args:
        scores (`torch.Tensor`): floating point, shape (out, in), `in` divisible by `m`.
        n (`int`): entries kept per group, from 0 to `m`.
        m (`int`): size of a group.

    Returns:
        `torch.Tensor`: bool, shape (out, in), exactly `n` of every `m` entries of a row `True`.
    """
    return largest_in_rows(scores.detach().reshape(-1, m), n).view(scores.shape)


def largest_in_rows(scores: torch.Tensor, k: int) -> torch.Tensor:
    """Mask of the `k` largest scores of each row; of equal ones the first.

    On a CPU by NumPy's partition, many times as fast as a sort; rows in which scores are tied are sorted.

    Args:
        scores (`torch.Tensor`): floating point, shape (rows, columns).
        k (`int`): from 0 to the number of columns.

    Returns:
        `torch.Tensor`: bool, shape (rows, columns), exactly `k` entries of a row `True`.

    Raises:
        ValueError: the scores hold NaN; not noticed on an accelerator.
    """
    columns = scores.shape[1]
    if not on_cpu(scores):
        return _first_of_sorted(scores, k)
    check_ranked(scores)
    if k in (0, columns):
        return torch.full_like(scores, k == columns, dtype=torch.bool)
    scores = scores.detach()
    values = scores if scores.dtype in (torch.float32, torch.float64) else scores.float()
    mask, _, tied = rows_by_partition(values, k)
    if len(tied):
        mask[tied] = _first_of_sorted(scores[tied], k)
    return mask


def rows_by_partition(values: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """What is at least the k-th largest of its row, by NumPy, many times as fast as torch on a CPU.

    Args:
        values (`torch.Tensor`): float32 or float64, on the CPU, without NaN, shape (rows, columns).
        k (`int`): from 1 to the number of columns.

    Returns:
        `tuple[torch.Tensor, torch.Tensor, torch.Tensor]`: the mask (bool); the k-th largest of each row, shape (rows,);
        numbers of the rows (int64) in which the mask has more than `k` entries, because some are tied.
    """
    array = values.numpy()
    threshold = np.partition(array, array.shape[1] - k, axis=1)[:, array.shape[1] - k].copy()
    mask = array >= threshold[:, None]
    tied = np.flatnonzero(np.count_nonzero(mask, axis=1) > k)
    return torch.from_numpy(mask), torch.from_numpy(threshold), torch.from_numpy(tied)


def _first_of_sorted(scores: torch.Tensor, k: int) -> torch.Tensor:
    order = scores.argsort(dim=1, descending=True, stable=True)[:, :k]
    return torch.zeros_like(scores, dtype=torch.bool).scatter_(1, order, True)
