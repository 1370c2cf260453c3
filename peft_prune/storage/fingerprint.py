"""Fingerprint of a weight: a few of its values, enough to tell whether a mask was made for it."""

from __future__ import annotations

from typing import Optional

import torch

from ..selection.topk import _SCRAMBLE


SAMPLES = 16
# Copies of one model in float32, bfloat16 and float16 differ by rounding: by one unit in the last place of bfloat16 at
# most, which is up to 2**-7 of a value, and by an absolute error where float16 is subnormal.
_RELATIVE, _ABSOLUTE = 2.0**-7, 1e-7


def _sample(weight: torch.Tensor) -> torch.Tensor:
    """Values at fixed positions, spread over the matrix: float32, shape (16,), on the CPU."""
    positions = torch.arange(SAMPLES, dtype=torch.int64) * _SCRAMBLE % weight.numel()
    rows = torch.div(positions, weight.shape[1], rounding_mode="floor").to(weight.device)
    columns = (positions % weight.shape[1]).to(weight.device)
    return weight.detach()[rows, columns].float().cpu()


def fingerprint(weight: torch.Tensor) -> str:
    """Sampled values in bfloat16.

    Args:
        weight (`torch.Tensor`): floating point, shape (out, in).

    Returns:
        `str`: 64 hexadecimal digits, 4 for each of 16 values.
    """
    words = _sample(weight).bfloat16().view(torch.int16).tolist()
    return "".join(f"{word & 0xFFFF:04x}" for word in words)


def agrees(weight: torch.Tensor, stored: str) -> Optional[bool]:
    """Whether a weight is the one that a fingerprint was taken of, up to the rounding of half precision.

    Args:
        weight (`torch.Tensor`): shape (out, in).
        stored (`str`): what [`fingerprint`] returned.

    Returns:
        `bool` or `None`: `None` if it cannot be told, because the weight is quantised or not on a real device.
    """
    if weight.device.type == "meta" or not weight.is_floating_point():
        return None
    words = torch.tensor([int(stored[i : i + 4], 16) for i in range(0, 4 * SAMPLES, 4)], dtype=torch.int32)
    expected = (words << 16).view(torch.float32)
    found = _sample(weight)
    tolerance = _RELATIVE * torch.maximum(expected.abs(), found.abs()) + _ABSOLUTE
    same = ((expected - found).abs() <= tolerance) | (expected == found)
    return bool(same.all())


def is_fingerprint(text: object) -> bool:
    """Whether a value has the form of a fingerprint."""
    return isinstance(text, str) and len(text) == 4 * SAMPLES and all(c in "0123456789abcdef" for c in text)
