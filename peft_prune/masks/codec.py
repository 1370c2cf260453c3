"""The stored form of a mask: one bit a weight, and the checks that a stored mask has to pass."""

from __future__ import annotations

import zlib
from typing import Any

import numpy as np
import torch


class MaskFormatError(ValueError):
    """A stored mask is damaged, or was made for another model."""


def packed_size(shape: tuple[int, int]) -> int:
    """Bytes that the mask of an (out, in) matrix takes."""
    return (shape[0] * shape[1] + 7) // 8


def pack_mask(mask: torch.Tensor) -> torch.Tensor:
    """Pack a mask to bits, row-major, the first weight in the lowest bit of the first byte; bits left over are 0.

    Args:
        mask (`torch.Tensor`): bool, shape (out, in).

    Returns:
        `torch.Tensor`: uint8, shape (ceil(out · in / 8),), on the device of `mask`.
    """
    bits = np.packbits(mask.detach().cpu().numpy().reshape(-1), bitorder="little")
    return torch.from_numpy(bits).to(mask.device)


def unpack_mask(packed: torch.Tensor, shape: tuple[int, int]) -> torch.Tensor:
    """Inverse of [`pack_mask`]: bool, of the given shape, on the device of `packed`.

    Raises:
        MaskFormatError: dtype or number of bytes do not fit the shape.
    """
    if packed.dtype != torch.uint8 or packed.numel() != packed_size(shape):
        raise MaskFormatError(
            f"a mask of shape {tuple(shape)} takes {packed_size(shape)} bytes (uint8), but {packed.numel()} elements "
            f"of {packed.dtype} are stored"
        )
    bits = torch.arange(8, device=packed.device, dtype=torch.uint8)
    flat = (packed.reshape(-1, 1) >> bits) & 1
    return flat.reshape(-1)[: shape[0] * shape[1]].view(shape).bool()


def describe_mask(packed: torch.Tensor, shape: tuple[int, int]) -> dict[str, Any]:
    """What `adapter_config.json` records of one mask: shape, number of kept weights, CRC-32 of the packed bytes."""
    data = packed.detach().cpu().numpy()
    kept = int(np.unpackbits(data).sum())
    return {"shape": list(shape), "kept": kept, "crc32": f"{zlib.crc32(data.tobytes()):08x}"}


def check_mask(name: str, packed: torch.Tensor, info: dict[str, Any]) -> None:
    """Compare a stored mask with its record.

    Raises:
        MaskFormatError: dtype, length, number of kept weights or checksum differ.
    """
    shape = (int(info["shape"][0]), int(info["shape"][1]))
    expected = packed_size(shape)
    if packed.dtype != torch.uint8 or packed.numel() != expected:
        raise MaskFormatError(
            f"The mask of {name!r} should be {expected} bytes (uint8) for shape {shape}, but the file holds "
            f"{packed.numel()} elements of {packed.dtype}. The adapter file is damaged, or is not the one that "
            "belongs to this adapter_config.json."
        )
    found = describe_mask(packed, shape)
    if found["crc32"] != info["crc32"] or found["kept"] != info["kept"]:
        raise MaskFormatError(
            f"The mask of {name!r} does not match its record in adapter_config.json (checksum {found['crc32']}, "
            f"expected {info['crc32']}; {found['kept']} weights kept, expected {info['kept']}). The adapter file is "
            "damaged, was never loaded, or belongs to another adapter."
        )
