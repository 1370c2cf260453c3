"""What solvers accept; errors name argument, value and fix."""

from __future__ import annotations

from typing import Any, Optional

import torch


def check_problem(weight: torch.Tensor, gram: torch.Tensor, mask: Optional[torch.Tensor] = None) -> None:
    """Raise `ValueError` unless weight, Gram matrix and mask belong together and are finite."""
    if weight.dim() != 2 or not weight.is_floating_point():
        raise ValueError(f"weight must be a float matrix, but is {weight.dtype} of shape {tuple(weight.shape)}.")
    if gram.dtype not in (torch.float32, torch.float64):
        raise ValueError(f"gram must be float32 or float64, but is {gram.dtype}. Accumulate it with add_inputs.")
    if tuple(gram.shape) != (weight.shape[1],) * 2:
        raise ValueError(
            f"gram has shape {tuple(gram.shape)}, but a weight of shape {tuple(weight.shape)} (out, in) needs "
            f"{(weight.shape[1],) * 2}."
        )
    if mask is not None and (mask.dtype != torch.bool or mask.shape != weight.shape):
        raise ValueError(
            f"mask must be bool of shape {tuple(weight.shape)}, but is {mask.dtype} of shape {tuple(mask.shape)}."
        )
    check_finite("weight", weight)
    check_finite("gram", gram)


def check_finite(name: str, values: torch.Tensor) -> None:
    """Raise `ValueError` if a tensor holds NaN or infinity."""
    if not all_finite(values):
        raise ValueError(f"{name} holds NaN or infinity. Check the base model and the calibration data.")


def all_finite(values: torch.Tensor) -> bool:
    """Whether a tensor holds no NaN and no infinity. A finite sum says so, and is many times quicker."""
    return bool(torch.isfinite(values.detach().sum())) or bool(torch.isfinite(values).all())


def check_damping(damping: Any) -> None:
    """Raise `ValueError` unless damping is a number from 0."""
    if isinstance(damping, bool) or not isinstance(damping, (int, float)) or not 0 <= damping < float("inf"):
        raise ValueError(f"damping={damping!r} must be a number, at least 0, such as 0.01.")


def check_whole(name: str, value: Any, least: int) -> None:
    """Raise `ValueError` unless an argument is a whole number from `least`."""
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(f"{name}={value!r} must be a whole number, at least {least}.")
