"""The penalty that pushes scores down, `λ · mean(sigmoid(S))`, and its gradient in closed form."""

from __future__ import annotations

import torch


def sigmoid_penalty(scores: torch.Tensor, offset: float = 0.0) -> torch.Tensor:
    """Mean of `sigmoid(S - offset)` over one matrix (SMP, eq. 8; movement pruning, section 4): a 0-dim tensor."""
    return torch.sigmoid(scores.float() - offset).mean()


def sigmoid_penalty_grad(scores: torch.Tensor, coefficient: torch.Tensor, offset: float = 0.0) -> torch.Tensor:
    """Gradient of `coefficient · sum(σ(S − offset))`: `coefficient · σ · (1 − σ)`, shape and dtype of `scores`."""
    probability = torch.sigmoid(scores - offset if offset else scores)
    return probability.addcmul_(probability, probability, value=-1).mul_(coefficient.to(scores.dtype))
