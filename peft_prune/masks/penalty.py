"""The penalty that pushes scores down, `λ · mean(sigmoid(S))`, and its gradient in closed form."""

from __future__ import annotations

import torch


def sigmoid_penalty(scores: torch.Tensor) -> torch.Tensor:
    """Mean of `sigmoid(S)` over one matrix (SMP, eq. 8; movement pruning, section 4): a 0-dim tensor."""
    return torch.sigmoid(scores.float()).mean()


def sigmoid_penalty_grad(scores: torch.Tensor, coefficient: torch.Tensor) -> torch.Tensor:
    """Gradient of `coefficient · sum(sigmoid(S))`: `coefficient · σ(S) · (1 − σ(S))`, shape and dtype of `scores`."""
    probability = torch.sigmoid(scores)
    return probability * (1 - probability) * coefficient.to(scores.dtype)
