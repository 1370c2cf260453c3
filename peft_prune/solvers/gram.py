"""Gram matrices of a layer's inputs: accumulating, damping, and the loss that they measure."""

from __future__ import annotations

import torch

from ..selection.device import on_cpu
from .checks import check_damping, check_problem


_STRIPE = 256  # columns for which a product is computed at once
_DEAD = 1e-6  # of the mean: the diagonal that an input gets which was always zero


def add_inputs(gram: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """Add `xᵀx` to a Gram matrix, in place and in its dtype.

    On a CPU only one triangle is multiplied out, and mirrored.

    Args:
        gram (`torch.Tensor`): float32 or float64, shape (in, in), symmetric; zeros at first.
        x (`torch.Tensor`): floating point, shape (..., in): inputs, one token after another, without padding.

    Returns:
        `torch.Tensor`: `gram`.

    Raises:
        ValueError: the shapes do not fit.
    """
    if not x.dim() or gram.shape != (x.shape[-1], x.shape[-1]):
        raise ValueError(
            f"gram has shape {tuple(gram.shape)}, but inputs of shape {tuple(x.shape)} need (in, in) with in = "
            f"{x.shape[-1] if x.dim() else 'their last size'}. Start with torch.zeros(in, in)."
        )
    return mirror_triangle(add_triangle(gram, x))


def add_triangle(gram: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """[`add_inputs`] for the upper triangle only; what is below it is not to be read until [`mirror_triangle`]."""
    flat = x.detach().reshape(-1, x.shape[-1]).to(gram)
    if not on_cpu(gram):
        return gram.addmm_(flat.T, flat)
    for start in range(0, len(gram), _STRIPE):
        end = start + _STRIPE
        gram[start:end, start:].addmm_(flat[:, start:end].T, flat[:, start:])
    return gram


def mirror_triangle(gram: torch.Tensor) -> torch.Tensor:
    """Copy the upper triangle of a matrix that [`add_triangle`] made to the lower one, in place; the same matrix."""
    for start in range(0, len(gram) if on_cpu(gram) else 0, _STRIPE):
        end = start + _STRIPE
        gram[end:, start:end] = gram[start:end, end:].T
    return gram


def damped(gram: torch.Tensor, damping: float) -> torch.Tensor:
    """`G + λ·mean(diag G)·I`, but next to nothing where an input was always zero.

    The weights of such an input have no effect, so solvers remove them first. Its diagonal is positive all the same.

    Args:
        gram (`torch.Tensor`): floating point, shape (in, in), symmetric.
        damping (`float`): λ, at least 0.

    Returns:
        `torch.Tensor`: a new matrix of the dtype and shape of `gram`.

    Raises:
        ValueError: damping is negative.
    """
    check_damping(damping)
    result = gram.clone()
    diagonal = result.diagonal()
    mean = diagonal.mean()
    mean = torch.where(mean > 0, mean, torch.ones_like(mean))
    dead = diagonal <= 0
    diagonal.copy_(torch.where(dead, _DEAD * mean, diagonal + damping * mean))
    return result


def cholesky(matrix: torch.Tensor) -> torch.Tensor:
    """Lower Cholesky factor of a damped Gram matrix.

    Raises:
        ValueError: it is not positive definite in its precision.
    """
    factor, info = torch.linalg.cholesky_ex(matrix)
    if int(info):
        raise ValueError(
            "gram is not positive definite: inputs depend on each other. Use a larger damping, such as 0.01, or more "
            "calibration tokens."
        )
    return factor


def loss(weight: torch.Tensor, values: torch.Tensor, gram: torch.Tensor) -> float:
    """Relative loss of a layer's output: `tr((Ŵ − W) G (Ŵ − W)ᵀ) / tr(W G Wᵀ)`.

    Args:
        weight (`torch.Tensor`): W, floating point, shape (out, in).
        values (`torch.Tensor`): Ŵ, floating point, the same shape.
        gram (`torch.Tensor`): float32 or float64, shape (in, in).

    Returns:
        `float`: 0 for equal outputs, 1 for an output of zeros; 0 if the layer's output was zero anyway.

    Raises:
        ValueError: shapes do not fit, or a tensor is not finite.
    """
    check_problem(weight, gram)
    if values.shape != weight.shape:
        raise ValueError(f"values has shape {tuple(values.shape)}, but the weight has {tuple(weight.shape)}.")
    w = weight.detach().to(gram)
    whole = float(row_losses(w, gram).sum())
    return float(row_losses(values.detach().to(gram) - w, gram).sum()) / whole if whole > 0 else 0.0


def row_losses(error: torch.Tensor, gram: torch.Tensor) -> torch.Tensor:
    """`e G eᵀ` of each row e: float64, shape (out,)."""
    return ((error @ gram).double() * error.double()).sum(1)
