"""Importance scores: where the scores of a matrix start."""

from __future__ import annotations

import torch


def initial_scores(weight: torch.Tensor, kind: str) -> torch.Tensor:
    """Scores before training.

    Args:
        weight (`torch.Tensor`): floating point, shape (out, in).
        kind (`str`): `"zeros"` (the papers'); `"magnitude"`, `|W| / std(W)`, so that training starts from magnitude
            pruning; `"random"`, standard normal, the floor to compare with.

    Returns:
        `torch.Tensor`: float32, shape (out, in), on the device of `weight`.
    """
    if kind == "zeros":
        return torch.zeros(weight.shape, dtype=torch.float32, device=weight.device)
    if kind == "random":
        return torch.randn(weight.shape, dtype=torch.float32, device=weight.device)
    if kind == "magnitude":
        magnitude = weight.detach().float().abs()
        return magnitude / weight.detach().float().std().clamp_min(torch.finfo(torch.float32).tiny)
    raise ValueError(f"score_init={kind!r} is unknown. Use 'zeros', 'magnitude' or 'random'.")


SCORE_INITS = ("zeros", "magnitude", "random")
