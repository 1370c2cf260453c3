"""Allocation: how a density is shared out among the matrices of a model."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence

import torch

from .selection import topk_mask


ALLOCATIONS = ("local", "score", "global")


def share_by_weight(sizes: Sequence[int], weights: Sequence[float], density: float) -> list[int]:
    """Share out `round(density · Σ sizes)` places in proportion to `size · weight`, none above its size.

    What a full matrix cannot take goes to the others (the SMP reference drops it and ends below the density asked).

    Args:
        sizes (`Sequence[int]`): number of weights of each matrix.
        weights (`Sequence[float]`): non-negative share of each matrix per weight.
        density (`float`): share of all weights to keep.

    Returns:
        `list[int]`: places of each matrix; their sum is exact.
    """
    total = round(density * sum(sizes))
    open_ones = list(range(len(sizes)))
    places = [0.0] * len(sizes)
    left = float(total)
    while open_ones:
        whole = sum(sizes[i] * weights[i] for i in open_ones)
        # all weights zero: nothing tells the matrices apart, so share evenly
        share = {i: left * (sizes[i] * weights[i] / whole if whole else 1 / len(open_ones)) for i in open_ones}
        full = [i for i in open_ones if share[i] >= sizes[i]]
        if not full:
            for i in open_ones:
                places[i] = share[i]
            break
        for i in full:
            places[i] = float(sizes[i])
            left -= sizes[i]
        open_ones = [i for i in open_ones if i not in full]
    counts = [int(p) for p in places]
    # largest remainder, then position: the sum is exact and no rank can differ
    for i in sorted(range(len(sizes)), key=lambda i: (counts[i] - places[i], i)):
        if sum(counts) >= total:
            break
        counts[i] += counts[i] < sizes[i]
    return counts


def allocate_by_score(
    scores: Iterable[torch.Tensor], kinds: Sequence[str], density: float, temperature: float
) -> list[int]:
    """SMP-S (Jiang et al. 2023, eq. 6): matrices of one kind share their density by mean score.

    `v_l = v · L · r_l / Σ_k r_k` with `r_l = mean(sigmoid(S_l / temperature))` over the `L` matrices of a kind.

    Args:
        scores (`Iterable[torch.Tensor]`): scores of each matrix, asked for once.
        kinds (`Sequence[str]`): kind of each matrix, for instance its name without the layer's number.
        density (`float`): share of weights to keep in each kind.
        temperature (`float`): positive; large values even out the shares.

    Returns:
        `list[int]`: number of weights each matrix keeps.
    """
    groups: dict[str, list[int]] = defaultdict(list)
    for i, kind in enumerate(kinds):
        groups[kind].append(i)
    measured = [(s.numel(), _mean_sigmoid(s.detach().float(), temperature)) for s in scores]
    means = torch.stack([mean for _, mean in measured]).tolist()
    counts = [0] * len(measured)
    for members in groups.values():
        sizes = [measured[i][0] for i in members]
        for i, count in zip(members, share_by_weight(sizes, [means[i] for i in members], density), strict=True):
            counts[i] = count
    return counts


def _mean_sigmoid(scores: torch.Tensor, temperature: float) -> torch.Tensor:
    return torch.sigmoid(scores if temperature == 1 else scores / temperature).mean()


def allocate_globally(scores: Sequence[torch.Tensor], density: float) -> list[int]:
    """One threshold for all matrices: how many of the largest scores overall fall into each."""
    sizes = [s.numel() for s in scores]
    mask = topk_mask(torch.cat([s.detach().reshape(-1) for s in scores]), round(density * sum(sizes)))
    return [int(part.sum()) for part in mask.split(sizes)]
