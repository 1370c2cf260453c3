"""Mask and values together, by alternating directions (ADMM)."""

from __future__ import annotations

import torch

from .checks import check_problem, check_whole
from .gram import cholesky, damped
from .least_squares import refit
from .pattern import Pattern, check_pattern, choose


def admm(
    weight: torch.Tensor,
    gram: torch.Tensor,
    pattern: Pattern,
    damping: float = 0.01,
    rho: float = 1.0,
    rounds: int = 20,
    ramp: int = 15,
    steps: int = 5,
) -> tuple[torch.Tensor, torch.Tensor]:
    """A mask and new values: rounds of ADMM with a growing sparsity, then least squares on what stays.

    Boža 2024 (arXiv 2401.02938, algorithms 1 and 2), with the conjugate gradients of ALPS (Meng et al. 2024, arXiv
    2406.07831) at the end. Inputs are scaled to unit norm, so that the size of a weight is its importance: the first
    mask is Wanda's. A round keeps the largest `|W + U|` of each row or group as `Z`, adds what it removed to `U`, and
    moves `W` to where `‖(W − W₀)X‖² + ρ‖W − Z + U‖²` is smallest.

    Args:
        weight (`torch.Tensor`): floating point, shape (out, in).
        gram (`torch.Tensor`): float32 or float64, shape (in, in); its dtype is that of the arithmetic.
        pattern (`float` or `tuple[int, int]`): a sparsity in [0, 1), or (n, m).
        damping (`float`): added to the diagonal of the scaled Gram matrix, whose diagonal is 1.
        rho (`float`): ρ, positive: how fast `W` and `Z` come together.
        rounds (`int`): how many in all, one product with a matrix of the Gram matrix's size each.
        ramp (`int`): rounds in which the mask may change, the sparsity growing along a cubic; later ones fit values.
        steps (`int`): of conjugate gradients at the end, see [`refit`].

    Returns:
        `tuple[torch.Tensor, torch.Tensor]`: the mask (bool) and the values, zero where it is `False` (dtype of `gram`),
        both of shape (out, in); the same number in each row or group.

    Raises:
        ValueError: an argument is out of range, shapes do not fit, a tensor is not finite, or the damped Gram matrix
            is not positive definite.
    """
    check_problem(weight, gram)
    check_pattern(pattern, weight.shape[1])
    check_whole("ramp", ramp, 1)
    check_whole("rounds", rounds, ramp)
    if not 0 < rho < float("inf"):
        raise ValueError(f"rho={rho!r} must be a positive number, such as 1.0.")
    scale = damped(gram, 0.0).diagonal().sqrt()
    scaled = gram / scale / scale[:, None]
    original = weight.detach().to(gram) * scale
    pull = damped(scaled, damping)
    pull.diagonal().add_(rho)
    pull = torch.cholesky_inverse(cholesky(pull)).mul_(rho)
    current = original
    for number in range(1, rounds + 1):
        if number <= ramp:
            mask = choose(current.abs(), _at(pattern, number / ramp))
        if number < rounds:
            # Z − U is `current` with the signs of what is removed flipped; the new U is what is removed
            removed = current * ~mask
            current = original + (current - 2 * removed - original) @ pull + removed
    return mask, refit(original, mask, scaled, damping, steps, start=current) / scale


def _at(pattern: Pattern, progress: float) -> Pattern:
    """The current pattern; groups have all that they keep from the start."""
    return pattern if isinstance(pattern, tuple) else pattern * (1.0 - (1.0 - progress) ** 3)
