"""Masks at one bit a weight, packed and unpacked where they live."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch

from ..selection.device import on_cpu


# the eight entries that each byte stands for, as one number of 64 bits that is read as eight bytes
_OCTETS = torch.from_numpy(np.unpackbits(np.arange(256, dtype=np.uint8), bitorder="little").view(np.int64))

_ONES = np.array([bin(byte).count("1") for byte in range(256)], dtype=np.uint8)

_PART = 1 << 15  # bytes of packed bits that are unpacked at once


def pack_bits(mask: torch.Tensor) -> torch.Tensor:
    """Pack a mask, row-major, the first entry in the lowest bit of the first byte; bits left over are 0.

    Args:
        mask (`torch.Tensor`): bool, any shape.

    Returns:
        `torch.Tensor`: uint8, shape (ceil(numel / 8),), on the device of `mask`.
    """
    flat = mask.detach().reshape(-1)
    if on_cpu(flat):
        return torch.from_numpy(np.packbits(flat.numpy(), bitorder="little"))
    return _pack_by_shifts(flat)


def unpack_bits(packed: torch.Tensor, shape: Sequence[int]) -> torch.Tensor:
    """Inverse of [`pack_bits`]: bool, of the given shape, on the device of `packed`; nothing waits for a GPU."""
    if on_cpu(packed):
        octets = torch.index_select(_OCTETS, 0, packed.int()).view(torch.uint8)
    else:
        octets = _unpack_by_shifts(packed)
    return octets[: math.prod(shape)].view(torch.bool).view(*shape)


def count_bits(packed: torch.Tensor) -> int:
    """Number of entries that are set in what [`pack_bits`] returned; a GPU is waited for."""
    return int(_ONES.take(packed.detach().cpu().numpy()).sum(dtype=np.int64))


def masked_by_bits(matrix: torch.Tensor, packed: torch.Tensor) -> torch.Tensor:
    """`matrix ⊙ mask`, without gradients: the dtype and shape of `matrix`, whose mask is `packed`.

    On a CPU a part at a time, so that the mask's entries stay in the cache: memory that is new costs several times as
    much as the product.
    """
    by_numpy = on_cpu(matrix) and matrix.is_contiguous() and matrix.dtype in (torch.float32, torch.float64)
    if torch.compiler.is_compiling() or not by_numpy:
        return matrix * unpack_bits(packed, matrix.shape).view(torch.uint8)
    result = torch.empty_like(matrix)
    # not by `.numpy()`, after which FSDP could not free the memory of a weight
    entries = np.from_dlpack(matrix.detach().view(-1))
    bits, out = packed.numpy(), result.view(-1).numpy()
    with np.errstate(invalid="ignore"):  # an infinite weight that is removed is NaN, as it is with torch
        for start in range(0, len(entries), 8 * _PART):
            part = slice(start, start + 8 * _PART)
            octets = np.unpackbits(bits[start // 8 :][:_PART], count=len(entries[part]), bitorder="little")
            np.multiply(entries[part], octets, out=out[part])
    return result


def _pack_by_shifts(flat: torch.Tensor) -> torch.Tensor:
    octets = torch.nn.functional.pad(flat.view(torch.uint8), (0, -flat.numel() % 8)).view(-1, 8)
    return (octets << _places(octets.device)).sum(1, dtype=torch.uint8)


def _unpack_by_shifts(packed: torch.Tensor) -> torch.Tensor:
    return ((packed[:, None] >> _places(packed.device)) & 1).view(-1)


def _places(device: torch.device) -> torch.Tensor:
    return torch.arange(8, dtype=torch.uint8, device=device)
