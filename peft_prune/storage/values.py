"""The stored form of kept values: bytes, in the places that the mask says. Specified in `docs/adapter_format.md`."""

from __future__ import annotations

import numpy as np
import torch


# bytes of a value
VALUE_DTYPES = {"float32": 4, "float16": 2, "bfloat16": 2, "int8": 1}


def values_size(kept: int, rows: int, dtype: str) -> int:
    """Bytes that `kept` values of a matrix take; int8 has a float32 scale for each of its rows besides."""
    return kept * VALUE_DTYPES[dtype] + (4 * rows if dtype == "int8" else 0)


def encode_values(matrix: torch.Tensor, mask: torch.Tensor, dtype: str) -> torch.Tensor:
    """Values at the places of a mask, row by row.

    Args:
        matrix (`torch.Tensor`): floating point, shape (out, in).
        mask (`torch.Tensor`): bool, shape (out, in).
        dtype (`str`): `"float32"`, `"float16"`, `"bfloat16"`, or `"int8"`: the largest value of a row becomes 127.

    Returns:
        `torch.Tensor`: uint8, one dimension, on the device of `matrix`.

    Raises:
        ValueError: a value is not finite, or too large for the dtype.
    """
    kept = matrix.detach().float()[mask]
    if dtype == "int8":
        scales = (matrix.detach().float() * mask).abs().amax(1) / 127
        row = mask.nonzero()[:, 0]
        # a row of zeros has scale 0, and nothing to divide
        stored = (kept / scales[row].clamp_min(torch.finfo(torch.float32).tiny)).round().to(torch.int8)
        parts = [scales, stored]
    else:
        parts = [kept.to(getattr(torch, dtype))]
    if not all(bool(torch.isfinite(part).all()) for part in parts if part.is_floating_point()):
        raise ValueError(f"A kept value is not finite in {dtype}. Use value_dtype='float32', or train again.")
    return torch.cat([_as_bytes(part) for part in parts])


def _as_bytes(numbers: torch.Tensor) -> torch.Tensor:
    """Bytes of a tensor of one dimension; torch cannot view one that is empty as another dtype."""
    return numbers.contiguous().view(torch.uint8) if numbers.numel() else numbers.to(torch.uint8)


def decode_values(stored: torch.Tensor, mask: torch.Tensor, dtype: str) -> torch.Tensor:
    """Inverse of [`encode_values`]: float32, shape (out, in), 0 where the mask is `False`.

    Raises:
        ValueError: the number of bytes is another one, or a value is not finite.
    """
    kept, rows = int(mask.sum()), mask.shape[0]
    if stored.dtype != torch.uint8 or stored.numel() != values_size(kept, rows, dtype):
        raise ValueError(f"{kept} values of {dtype} take {values_size(kept, rows, dtype)} bytes, not {stored.numel()}")
    # a slice may begin at an odd address, which a view of wider numbers does not allow
    data = np.frombuffer(stored.cpu().numpy().tobytes(), dtype=np.uint8)
    if dtype == "int8":
        scales = torch.from_numpy(data[: 4 * rows].view("<f4").copy()).to(mask.device)
        row = mask.nonzero()[:, 0]
        values = torch.from_numpy(data[4 * rows :].view(np.int8).copy()).to(mask.device).float() * scales[row]
    else:
        numbers = torch.from_numpy(data.copy())
        values = (numbers.view(getattr(torch, dtype)) if len(data) else numbers).to(mask.device).float()
    if not bool(torch.isfinite(values).all()):
        raise ValueError("values that are not finite are stored")
    result = torch.zeros(mask.shape, dtype=torch.float32, device=mask.device)
    result[mask] = values
    return result
