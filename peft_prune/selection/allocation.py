"""Allocation: how a density is shared out among the matrices of a model."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Sequence

import torch

from .topk import topk_mask


ALLOCATIONS = ("local", "row", "score", "global")


def share_by_weight(sizes: torch.Tensor, weights: torch.Tensor, density: float) -> torch.Tensor:
    """Share out `round(density · Σ sizes)` places of each row in proportion to `size · weight`, none above its size.

    What a full matrix cannot take goes to the others (the SMP reference drops it and ends below the density asked).
    No number is read by the host, so on an accelerator nothing waits.

    Args:
        sizes (`torch.Tensor`): number of weights of each matrix: int64, shape (rows, matrices), 0 for none.
        weights (`torch.Tensor`): non-negative share of each matrix per weight: float, the same shape.
        density (`float`): share of all weights to keep.

    Returns:
        `torch.Tensor`: places of each matrix: int64, the same shape; the sum of a row is exact.
    """
    total = (density * sizes.sum(1, keepdim=True).double()).round()
    size, weight = sizes.double(), weights.double()
    is_open, left, places = sizes > 0, total, torch.zeros_like(size)
    for _ in range(sizes.shape[1]):  # each time one matrix is filled at least, or nothing changes any more
        wanted = size * weight * is_open
        whole = wanted.sum(1, keepdim=True)
        # all weights zero: nothing tells the matrices apart, so share evenly
        even = is_open / is_open.sum(1, keepdim=True).clamp(min=1)
        share = left * torch.where(whole > 0, wanted / whole, even)
        full = is_open & (share >= size)
        places = torch.where(is_open, torch.minimum(share, size), places)
        left = left - (size * full).sum(1, keepdim=True)
        is_open = is_open & ~full
    counts = places.floor()
    # largest remainder, then position: the sum is exact and no rank can differ
    has_room = counts < size
    order = torch.where(has_room, counts - places, 1.0).argsort(dim=1, stable=True)
    bump = order.argsort(dim=1) < total - counts.sum(1, keepdim=True)
    return (counts + (bump & has_room)).long()


def _one_each(counts: torch.Tensor, sizes: torch.Tensor) -> torch.Tensor:
    """Give a place to each matrix of a row that has none, at the cost of the one that has most.

    Where there are fewer places than matrices, the sum grows.

    Args:
        counts (`torch.Tensor`): places of each matrix: int64, shape (rows, matrices).
        sizes (`torch.Tensor`): weights of each matrix: int64, the same shape, 0 for none.
    """
    filled = torch.maximum(counts, sizes.clamp(max=1))
    excess = (filled - counts).sum(1, keepdim=True)
    largest = filled.argmax(dim=1, keepdim=True)
    taken = excess.minimum((filled.gather(1, largest) - 1).clamp(min=0))
    return filled.scatter_add(1, largest, -taken)


def allocate_by_score(
    scores: Iterable[torch.Tensor], kinds: Sequence[str], density: float, temperature: float
) -> torch.Tensor:
    """SMP-S (Jiang et al. 2023, eq. 6): matrices of one kind share their density by mean score.

    `v_l = v · L · r_l / Σ_k r_k` with `r_l = mean(sigmoid(S_l / temperature))` over the `L` matrices of a kind.

    Args:
        scores (`Iterable[torch.Tensor]`): scores of each matrix, asked for once.
        kinds (`Sequence[str]`): kind of each matrix, for instance its name without the layer's number.
        density (`float`): share of weights to keep in each kind.
        temperature (`float`): positive; large values even out the shares.

    Returns:
        `torch.Tensor`: number of scores that each matrix keeps: int64, shape (matrices,), on the device of the first.
    """
    measured = [(s.numel(), _mean_sigmoid(s.detach().float(), temperature)) for s in scores]
    device = measured[0][1].device
    members, sizes = _rows_by_kind(tuple(kinds), tuple(size for size, _ in measured), device)
    means = torch.stack([mean.to(device) for _, mean in measured] + [torch.zeros((), device=device)])
    counts = _one_each(share_by_weight(sizes[members], means[members], density), sizes[members])
    return torch.zeros_like(sizes).scatter(0, members.flatten(), counts.flatten())[:-1]


@functools.lru_cache(maxsize=8)
def _rows_by_kind(
    kinds: tuple[str, ...], sizes: tuple[int, ...], device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """Indices of the matrices of each kind, a row each, and sizes; both int64. Made once: copying them takes a wait.

    Rows that are shorter than others end with the index of a matrix of size 0, the last one.
    """
    rows = [[i for i, kind in enumerate(kinds) if kind == row] for row in dict.fromkeys(kinds)]
    width = max(map(len, rows))
    filled = [row + [len(kinds)] * (width - len(row)) for row in rows]
    return torch.tensor(filled, device=device), torch.tensor([*sizes, 0], device=device)


def _mean_sigmoid(scores: torch.Tensor, temperature: float) -> torch.Tensor:
    return torch.sigmoid(scores if temperature == 1 else scores / temperature).mean()


def allocate_globally(scores: Sequence[torch.Tensor], density: float) -> torch.Tensor:
    """One threshold for all matrices: how many of the largest scores overall fall into each (int64, one dimension).

    Each keeps one at least.
    """
    sizes = [s.numel() for s in scores]
    mask = topk_mask(torch.cat([s.detach().reshape(-1) for s in scores]), round(density * sum(sizes)))
    counts = torch.stack([part.sum() for part in mask.split(sizes)])
    return _one_each(counts[None], torch.ones_like(counts)[None])[0]
