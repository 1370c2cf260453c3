"""Importance scores: where the scores of a matrix start."""

from __future__ import annotations

import torch

from ..selection.granularity import pool


# of the mean magnitude; float32 rounds at 1e-7
_CONSTANT = 1e-6


def initial_scores(weight: torch.Tensor, kind: str | float, block: tuple[int, int] = (1, 1)) -> torch.Tensor:
    """Scores before training.

    Args:
        weight (`torch.Tensor`): floating point, shape (out, in).
        kind (`str` or `float`): `"zeros"` (the papers'); `"magnitude"`, the mean of `|W| / std(W)` over a block, so
            that training starts from magnitude pruning (see [`spread_of`] for a constant matrix); `"random"`,
            standard normal, the floor to compare with; or a number.
        block (`tuple[int, int]`): rows and columns that share a score.

    Returns:
        `torch.Tensor`: float32, shape (out / rows, in / columns), on the device of `weight`.
    """
    shape = (weight.shape[0] // block[0], weight.shape[1] // block[1])
    if kind == "zeros":
        return torch.zeros(shape, dtype=torch.float32, device=weight.device)
    if kind == "random":
        return torch.randn(shape, dtype=torch.float32, device=weight.device)
    if kind == "magnitude":
        magnitude = weight.detach().float().abs()
        magnitude /= spread_of(weight)
        return pool(magnitude, block) / (block[0] * block[1])
    if isinstance(kind, (int, float)):
        return torch.full(shape, float(kind), dtype=torch.float32, device=weight.device)
    raise ValueError(f"score_init={kind!r} is unknown. Use 'zeros', 'magnitude' or 'random'.")


def spread_of(weight: torch.Tensor) -> torch.Tensor:
    """What magnitudes are divided by: the standard deviation of a weight.

    A single weight has none, and that of a constant matrix is 0 or a rounding error. The mean magnitude takes its place
    then, so that all scores start at 1, or 1 if all weights are 0.

    Args:
        weight (`torch.Tensor`): floating point, any shape.

    Returns:
        `torch.Tensor`: float32, 0-dim, positive, on the device of `weight`.
    """
    values = weight.detach().float()
    mean = values.abs().mean()
    fallback = torch.where(mean > 0, mean, torch.ones_like(mean))
    if values.numel() < 2:
        return fallback
    spread = values.std()
    return torch.where(spread > _CONSTANT * mean, spread, fallback)


SCORE_INITS = ("zeros", "magnitude", "random")
