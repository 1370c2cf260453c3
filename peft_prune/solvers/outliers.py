"""Sparsities of layers by their outliers (OWL, Yin et al. 2024, arXiv 2310.05175)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Optional

import torch

from .checks import check_finite


def outlier_ratio(importance: Sequence[torch.Tensor], multiple: float = 5.0) -> float:
    """Share of a block's weights whose importance is above `multiple` times the mean (section 3.2).

    Args:
        importance (`Sequence[torch.Tensor]`): of each matrix of the block, floating point, any shape, not negative;
            Wanda's `|W|·‖x‖` in the paper.
        multiple (`float`): M; 5 or 7 in the paper.

    Returns:
        `float`: between 0 and 1.

    Raises:
        ValueError: the importance is not finite.
    """
    total, count = 0.0, sum(part.numel() for part in importance)
    for part in importance:
        check_finite("importance", part)
        total += float(part.detach().double().sum())
    return sum(int((part > multiple * total / count).sum()) for part in importance) / count


def owl_sparsities(
    ratios: Sequence[float], sparsity: float, spread: float = 0.08, sizes: Optional[Sequence[int]] = None
) -> list[float]:
    """Sparsities that fall with the outliers of a layer, with a given mean.

    As in the reference: ratios are stretched to a range of width 2·spread and shifted to the mean. Layers that would
    leave [0, 0.999] end there, and the others make up for it.

    Args:
        ratios (`Sequence[float]`): outlier ratio of each layer, see [`outlier_ratio`].
        sparsity (`float`): mean of all, in [0, 1), each layer counted by its size.
        spread (`float`): λ, not negative: half the difference between most and least sparse layer.
        sizes (`Sequence[int]`, *optional*): weights of each layer; equal by default.

    Returns:
        `list[float]`: sparsity of each layer, exact in the mean.

    Raises:
        ValueError: an argument is out of range, or there are not as many sizes as ratios.
    """
    _check(ratios, sparsity, spread, sizes)
    given = torch.tensor(list(ratios), dtype=torch.float64)
    shares = torch.ones_like(given) if sizes is None else torch.tensor(list(sizes), dtype=torch.float64)
    width = given.max() - given.min()
    offsets = -2 * spread * (given - given.min()) / width if width > 0 else torch.zeros_like(given)
    return _shifted(offsets, shares / shares.sum(), sparsity).tolist()


_MOST = 0.999


def check_owl(sparsity: float) -> None:
    """Raise `ValueError` if blocks cannot have sparsities that differ and have this mean."""
    if not 0 <= sparsity <= _MOST:
        raise ValueError(
            f"sparsity={sparsity!r} must be in [0, {_MOST}] for allocation='owl'. Use less, or allocation='local'."
        )


def _check(ratios: Sequence[float], sparsity: float, spread: float, sizes: Optional[Sequence[int]]) -> None:
    if not len(ratios) or not all(0 <= ratio < float("inf") for ratio in ratios):
        raise ValueError(f"ratios={list(ratios)!r:.200} must be numbers from 0, one for each layer.")
    check_owl(sparsity)
    if not 0 <= spread < 1:
        raise ValueError(f"spread={spread!r} must be in [0, 1), such as 0.08.")
    if sizes is not None and (len(sizes) != len(ratios) or not all(size > 0 for size in sizes)):
        raise ValueError(f"sizes={list(sizes)!r:.200} must be positive, one for each of the {len(ratios)} layers.")


def _shifted(offsets: torch.Tensor, shares: torch.Tensor, mean: float) -> torch.Tensor:
    """Offsets plus one number, cut to [0, 0.999], with that mean: float64. The number is found by bisection."""
    low, high = -offsets.max() - 0.0, _MOST - offsets.min()
    for _ in range(100):
        middle = (low + high) / 2
        too_large = float(((offsets + middle).clamp(0, _MOST) * shares).sum()) > mean
        low, high = (low, middle) if too_large else (middle, high)
    result = (offsets + low).clamp(0, _MOST)
    free = (result > 0) & (result < _MOST)
    if bool(free.any()):  # what rounding left
        result[free] += (mean - (result * shares).sum()) / shares[free].sum()
    return result
