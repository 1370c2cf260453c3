"""The best values for a given mask: least squares over the weights that stay, for all rows at once."""

from __future__ import annotations

from typing import Optional

import torch

from .checks import check_problem, check_whole
from .gram import damped


def refit(
    weight: torch.Tensor,
    mask: torch.Tensor,
    gram: torch.Tensor,
    damping: float = 0.01,
    steps: int = 10,
    start: Optional[torch.Tensor] = None,
) -> torch.Tensor:
    """Minimise `tr((Ŵ − W) G (Ŵ − W)ᵀ)` over the weights that stay, by conjugate gradients with G's diagonal in front.

    The solution of `(ŴG)_M = (WG)_M` with the damped G, row by row; one product with G a step serves all rows. ALPS
    (Meng et al. 2024, arXiv 2406.07831) does the same after its ADMM. No row ends with a larger loss, without the
    damping, than it began with.

    Args:
        weight (`torch.Tensor`): W, floating point, shape (out, in).
        mask (`torch.Tensor`): bool, the same shape: what stays.
        gram (`torch.Tensor`): float32 or float64, shape (in, in); its dtype is that of the arithmetic.
        damping (`float`): of the Gram matrix, see [`damped`].
        steps (`int`): products with the Gram matrix; a few suffice, 50 converge.
        start (`torch.Tensor`, *optional*): values to begin with, floating point, (out, in); W by default.

    Returns:
        `torch.Tensor`: Ŵ, dtype of `gram`, shape (out, in), zero outside of the mask.

    Raises:
        ValueError: an argument is out of range, shapes do not fit, or a tensor is not finite.
    """
    check_problem(weight, gram, mask)
    check_whole("steps", steps, 0)
    w, matrix = weight.detach().to(gram), damped(gram, damping)
    ridge = matrix.diagonal() - gram.diagonal()
    first = (w if start is None else start.detach().to(gram)) * mask
    values, full = first.clone(), (w - first) @ matrix  # what is left of the gradient, of removed weights too
    before = _losses(w - first, full, ridge)
    direction, slope = torch.zeros_like(w), torch.zeros_like(w[:, :1])
    for _ in range(steps):
        residual = full * mask
        ahead = residual / matrix.diagonal()
        new_slope = (residual * ahead).sum(1, keepdim=True)
        direction = ahead + direction * _ratio(new_slope, slope)
        slope = new_slope
        image = direction @ matrix
        step = _ratio(slope, (direction * image).sum(1, keepdim=True))
        values += step * direction
        full -= step * image
    worse = _losses(w - values, full, ridge) > before
    return torch.where(worse[:, None], first, values)


def _ratio(top: torch.Tensor, bottom: torch.Tensor) -> torch.Tensor:
    """A quotient, 0 where a row is solved."""
    return torch.where(bottom > 0, top / bottom, torch.zeros_like(top))


def _losses(error: torch.Tensor, image: torch.Tensor, ridge: torch.Tensor) -> torch.Tensor:
    """Loss of each row without the damping, from its error and the error's product with the damped Gram matrix."""
    return (error * (image - error * ridge)).sum(1)


def refit_exactly(weight: torch.Tensor, mask: torch.Tensor, gram: torch.Tensor, damping: float = 0.01) -> torch.Tensor:
    """What [`refit`] converges to, by solving one system for each row: exact, and slow for more than a few rows.

    Args, returns and errors are those of [`refit`].
    """
    check_problem(weight, gram, mask)
    w, matrix = weight.detach().to(gram), damped(gram, damping)
    values, wanted = torch.zeros_like(w), w @ matrix
    for row, stays in enumerate(mask):
        places = stays.nonzero().flatten()
        if len(places):
            values[row, places] = torch.linalg.solve(matrix[places][:, places], wanted[row, places])
    return values
