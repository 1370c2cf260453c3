"""The stored form of a mask, and the checks that a stored mask has to pass. Specified in `docs/adapter_format.md`."""

from __future__ import annotations

import zlib
from typing import Any, Optional

import torch

from ..selection.granularity import spread
from . import entropy, groups
from .bits import count_bits, pack_bits, unpack_bits
from .fingerprint import is_fingerprint
from .values import VALUE_DTYPES, decode_values, values_size


VERSION = 4
READABLE = (1, 2, 3, 4)  # 1 has one bit a weight and nothing else, 2 no blocks, 3 no code of n:m masks
_PLAIN, _ENTROPY, _GROUPS = 0, 1, 2
_DECODERS = {_ENTROPY: entropy.decode_packed, _GROUPS: groups.decode_packed}


class MaskFormatError(ValueError):
    """A stored mask is damaged, or was made for another model."""


def packed_size(shape: tuple[int, int]) -> int:
    """Bytes that the mask of an (out, in) matrix takes at one bit a weight."""
    return (shape[0] * shape[1] + 7) // 8


def pack_mask(mask: torch.Tensor) -> torch.Tensor:
    """Pack a mask to bits, row-major, the first weight in the lowest bit of the first byte; bits left over are 0.

    Args:
        mask (`torch.Tensor`): bool, shape (out, in).

    Returns:
        `torch.Tensor`: uint8, shape (ceil(out · in / 8),), on the device of `mask`.
    """
    return pack_bits(mask)


def unpack_mask(packed: torch.Tensor, shape: tuple[int, int]) -> torch.Tensor:
    """Inverse of [`pack_mask`]: bool, of the given shape, on the device of `packed`.

    Raises:
        MaskFormatError: dtype or number of bytes do not fit the shape.
    """
    _check_packed(packed, shape)
    return unpack_bits(packed, shape)


def _check_packed(packed: torch.Tensor, shape: tuple[int, int]) -> None:
    if packed.dtype != torch.uint8 or packed.numel() != packed_size(shape):
        raise MaskFormatError(
            f"a mask of shape {tuple(shape)} takes {packed_size(shape)} bytes (uint8), but {packed.numel()} elements "
            f"of {packed.dtype} are stored"
        )


def encode_mask(mask: torch.Tensor) -> torch.Tensor:
    """Store a mask in whatever is shortest: one bit a weight, its entropy code, or the code of its n:m pattern.

    Args:
        mask (`torch.Tensor`): bool, shape (out, in).

    Returns:
        `torch.Tensor`: uint8, one dimension, on the device of `mask`; the first byte says which of these it is.
    """
    codes = [bytes([_PLAIN]) + pack_mask(mask).cpu().numpy().tobytes()]
    if mask.numel():
        bits = mask.detach().cpu().numpy()
        codes.append(bytes([_ENTROPY]) + entropy.encode(bits))
        if (pattern := groups.pattern_of(bits)) is not None:
            codes.append(bytes([_GROUPS]) + groups.encode(bits, *pattern))
    return torch.frombuffer(bytearray(min(codes, key=len)), dtype=torch.uint8).to(mask.device)


def decode_mask(stored: torch.Tensor, shape: tuple[int, int], version: int = VERSION) -> torch.Tensor:
    """Inverse of [`encode_mask`], for files of every version.

    Args:
        stored (`torch.Tensor`): uint8, one dimension.
        shape (`tuple[int, int]`): (out, in).
        version (`int`): `mask_format` of the adapter's config.

    Returns:
        `torch.Tensor`: bool, of the given shape, on the device of `stored`.

    Raises:
        MaskFormatError: the bytes are no mask of this shape.
    """
    return unpack_bits(decode_bits(stored, shape, version), shape)


def decode_bits(stored: torch.Tensor, shape: tuple[int, int], version: int = VERSION) -> torch.Tensor:
    """[`decode_mask`] at one bit per weight, without unpacking it on the way where that can be avoided.

    Returns:
        `torch.Tensor`: uint8, shape (ceil(out · in / 8),), as [`pack_mask`] packs it, on the device of `stored`.

    Raises:
        MaskFormatError: the bytes are no mask of this shape.
    """
    if version == 1:
        return _decode_plain(stored, shape)
    if stored.dtype != torch.uint8 or stored.dim() != 1 or not stored.numel():
        raise MaskFormatError("a mask is stored as one dimension of uint8 with at least one byte")
    kind = int(stored[0])
    if kind == _PLAIN:
        return _decode_plain(stored[1:], shape)
    if kind not in _DECODERS or 0 in shape or (kind == _GROUPS and version < 4):
        raise MaskFormatError(f"its first byte, {kind}, names no known code for shape {tuple(shape)}")
    try:
        packed = _DECODERS[kind](stored[1:].cpu().numpy(), shape)
    except ValueError as error:
        raise MaskFormatError(str(error)) from error
    return torch.from_numpy(packed).to(stored.device)


def _decode_plain(stored: torch.Tensor, shape: tuple[int, int]) -> torch.Tensor:
    """A copy without the bits after the last weight, which a file may have set."""
    _check_packed(stored, shape)
    packed, left = stored.reshape(-1).clone(), shape[0] * shape[1] % 8
    if left:
        packed[-1] &= (1 << left) - 1
    return packed


def mask_to_blocks(mask: torch.Tensor, block: tuple[int, int]) -> torch.Tensor:
    """One bit for each block of a mask that keeps or removes whole blocks.

    Args:
        mask (`torch.Tensor`): bool, shape (out, in).
        block (`tuple[int, int]`): rows and columns of a block; they divide `out` and `in`.

    Returns:
        `torch.Tensor`: bool, shape (out / rows, in / columns).

    Raises:
        ValueError: a block is kept in part.
    """
    grid = mask.view(mask.shape[0] // block[0], block[0], mask.shape[1] // block[1], block[1])
    whole = grid.all(3).all(1)
    if bool((grid.any(3).any(1) != whole).any()):
        raise ValueError(f"A mask that keeps parts of blocks cannot be stored in blocks of {block}.")
    return whole


def stored_shape(info: dict[str, Any]) -> tuple[int, int]:
    """Shape of the bits that are stored: a bit for each weight, or for each block of weights."""
    (rows, columns), (height, width) = info["shape"], info.get("block", (1, 1))
    return rows // height, columns // width


def describe_mask(stored: torch.Tensor, mask: torch.Tensor, block: Optional[tuple[int, int]] = None) -> dict[str, Any]:
    """What `adapter_config.json` records of one mask.

    Args:
        stored (`torch.Tensor`): uint8, what is stored.
        mask (`torch.Tensor`): bool, shape (out, in).
        block (`tuple[int, int]`, *optional*): rows and columns that are kept or removed as one, if bits are stored for
            blocks.

    Returns:
        `dict[str, Any]`: `shape` of the matrix, number of weights `kept`, `bytes` stored and their CRC-32; `block` if
            one was given.
    """
    data = stored.detach().cpu().numpy().tobytes()
    return ({} if block is None else {"block": list(block)}) | {
        "shape": list(mask.shape),
        "kept": int(mask.sum()),
        "bytes": len(data),
        "crc32": f"{zlib.crc32(data):08x}",
    }


def describe_values(stored: torch.Tensor, dtype: str) -> dict[str, Any]:
    """What `adapter_config.json` records of kept values: their `dtype`, the `bytes` stored and their CRC-32."""
    data = stored.detach().cpu().numpy().tobytes()
    return {"dtype": dtype, "bytes": len(data), "crc32": f"{zlib.crc32(data):08x}"}


def check_values(name: str, stored: torch.Tensor, info: dict[str, Any]) -> None:
    """Compare the bytes of kept values with their record.

    Raises:
        MaskFormatError: dtype, length or checksum differ.
    """
    if stored.dtype != torch.uint8 or stored.dim() != 1 or stored.numel() != info["bytes"]:
        raise MaskFormatError(
            f"The values of {name!r} should be {info['bytes']} bytes (uint8), but the file holds "
            f"{tuple(stored.shape)} of {stored.dtype}. The adapter file is damaged, or belongs to another adapter."
        )
    found = f"{zlib.crc32(stored.detach().cpu().numpy().tobytes()):08x}"
    if found != info["crc32"]:
        raise MaskFormatError(
            f"The values of {name!r} do not match their record in adapter_config.json (checksum {found}, expected "
            f"{info['crc32']}). The adapter file is damaged, was never loaded, or belongs to another adapter."
        )


def load_values(name: str, stored: torch.Tensor, mask: torch.Tensor, info: dict[str, Any]) -> torch.Tensor:
    """Check kept values against their record, and decode them: float32, shape (out, in), 0 where nothing is kept.

    Raises:
        MaskFormatError: they are damaged; the message names the module.
    """
    check_values(name, stored, info)
    try:
        return decode_values(stored, mask, info["dtype"])
    except ValueError as error:
        raise MaskFormatError(f"The values of {name!r} cannot be read: {error}.") from error


def stored_size(info: dict[str, Any]) -> int:
    """Bytes of a stored mask according to its record."""
    return info["bytes"] if "bytes" in info else packed_size(stored_shape(info))


def is_mask_info(info: Any) -> bool:
    """Whether a record has the fields of [`describe_mask`], with values that are possible."""
    try:
        (rows, columns), kept, crc32 = info["shape"], info["kept"], info["crc32"]
        size = info.get("bytes", 1)
        if "weights" in info and not is_fingerprint(info["weights"]):
            return False
        whole = all(isinstance(n, int) and not isinstance(n, bool) for n in (rows, columns, kept, size))
        if not (whole and rows > 0 and columns > 0 and 0 <= kept <= rows * columns and isinstance(crc32, str)):
            return False
        if "values" in info and not _is_values_info(info["values"], kept, rows):
            return False
        height, width = info.get("block", (1, 1))
        if not (type(height) is type(width) is int and height > 0 and width > 0):
            return False
        if rows % height or columns % width or kept % (height * width):
            return False
        return 0 < size <= packed_size((rows // height, columns // width)) + 1
    except (TypeError, KeyError, ValueError, AttributeError):
        return False


def _is_values_info(info: Any, kept: int, rows: int) -> bool:
    known = info["dtype"] in VALUE_DTYPES and isinstance(info["crc32"], str) and type(info["bytes"]) is int
    return known and info["bytes"] == values_size(kept, rows, info["dtype"])


def check_stored(name: str, stored: torch.Tensor, info: dict[str, Any]) -> None:
    """Compare the bytes of a mask with their record.

    Raises:
        MaskFormatError: dtype, length or checksum differ.
    """
    expected = stored_size(info)
    if stored.dtype != torch.uint8 or stored.dim() != 1 or stored.numel() != expected:
        raise MaskFormatError(
            f"The mask of {name!r} should be {expected} bytes (uint8), but the file holds {tuple(stored.shape)} of "
            f"{stored.dtype}. The adapter file is damaged, or is not the one that belongs to this adapter_config.json."
        )
    found = f"{zlib.crc32(stored.detach().cpu().numpy().tobytes()):08x}"
    if found != info["crc32"]:
        raise MaskFormatError(
            f"The mask of {name!r} does not match its record in adapter_config.json (checksum {found}, expected "
            f"{info['crc32']}). The adapter file is damaged, was never loaded, or belongs to another adapter."
        )


def load_mask(name: str, stored: torch.Tensor, info: dict[str, Any], version: int) -> torch.Tensor:
    """Check a stored mask against its record, and decode it: bool, shape (out, in).

    Raises:
        MaskFormatError: it is damaged; the message names the module.
    """
    return unpack_bits(load_bits(name, stored, info, version), info["shape"])


def load_bits(name: str, stored: torch.Tensor, info: dict[str, Any], version: int) -> torch.Tensor:
    """[`load_mask`] at one bit per weight: uint8, shape (ceil(out · in / 8),), on the device of `stored`.

    Raises:
        MaskFormatError: it is damaged; the message names the module.
    """
    check_stored(name, stored, info)
    shape = stored_shape(info)
    try:
        packed = decode_bits(stored, shape, version)
    except MaskFormatError as error:
        raise MaskFormatError(f"The mask of {name!r} cannot be read: {error}.") from error
    if "block" in info:
        packed = pack_bits(spread(unpack_bits(packed, shape), tuple(info["block"])))
    kept = count_bits(packed)
    if kept != info["kept"]:
        raise MaskFormatError(
            f"The mask of {name!r} keeps {kept} weights, but adapter_config.json records {info['kept']}. "
            "One of the two was altered."
        )
    return packed
