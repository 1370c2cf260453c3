"""Importance scores: where the scores of a matrix start."""

from __future__ import annotations

import torch

from .granularity import pool


def initial_scores(weight: torch.Tensor, kind: str | float, block: tuple[int, int] = (1, 1)) -> torch.Tensor:
    """Scores before training.

    Args:
        weight (`torch.Tensor`): floating point, shape (out, in).
        kind (`str` or `float`): `"zeros"` (the papers'); `"magnitude"`, the mean of `|W| / std(W)` over a block, so
            that training starts from magnitude pruning; `"random"`, standard normal, the floor to compare with; or a
            number.
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
        magnitude /= weight.detach().float().std().clamp_min(torch.finfo(torch.float32).tiny)
        return pool(magnitude, block) / (block[0] * block[1])
    if isinstance(kind, (int, float)):
        return torch.full(shape, float(kind), dtype=torch.float32, device=weight.device)
    raise ValueError(f"score_init={kind!r} is unknown. Use 'zeros', 'magnitude' or 'random'.")


SCORE_INITS = ("zeros", "magnitude", "random")
