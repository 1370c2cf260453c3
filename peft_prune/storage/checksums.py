"""Records of stored tensors: shape, dtype and checksum. Specified in `docs/adapter_format.md`."""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from typing import Any

import torch

from .codec import MaskFormatError


def tensor_crc32(tensor: torch.Tensor) -> str:
    """CRC-32 of a tensor's bytes, row-major: 8 hexadecimal digits."""
    data = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
    return f"{zlib.crc32(data.numpy().tobytes()):08x}"


def describe_tensor(tensor: torch.Tensor) -> dict[str, Any]:
    """Record of a tensor of any shape and dtype: `shape`, `dtype` (as `"float32"`) and `crc32`."""
    dtype = str(tensor.dtype).removeprefix("torch.")
    return {"shape": list(tensor.shape), "dtype": dtype, "crc32": tensor_crc32(tensor)}


def check_tensor(name: str, tensor: torch.Tensor, info: Mapping[str, Any], fix: str) -> None:
    """Compare a tensor with its record.

    Args:
        name (`str`): what the error calls the tensor.
        tensor (`torch.Tensor`): any shape and dtype.
        info (`Mapping`): what [`describe_tensor`] returned.
        fix (`str`): end of the message.

    Raises:
        MaskFormatError: shape, dtype or checksum differ.
    """
    shape, dtype = list(tensor.shape), str(tensor.dtype).removeprefix("torch.")
    if shape != info["shape"] or dtype != info["dtype"]:
        raise MaskFormatError(
            f"The tensor {name!r} should be {tuple(info['shape'])} of {info['dtype']}, but the file holds "
            f"{tuple(shape)} of {dtype}. {fix}"
        )
    found = tensor_crc32(tensor)
    if found != info["crc32"]:
        raise MaskFormatError(
            f"The tensor {name!r} does not match its record (checksum {found}, expected {info['crc32']}). {fix}"
        )


def check_no_nan(name: str, tensor: torch.Tensor, fix: str) -> None:
    """Raise `MaskFormatError` if a tensor holds NaN."""
    if tensor.is_floating_point() and bool(torch.isnan(tensor).any()):
        raise MaskFormatError(f"The tensor {name!r} holds NaN. {fix}")


def is_tensor_record(record: Any) -> bool:
    """Whether a value is a dict of what [`describe_tensor`] returns, by key."""
    return isinstance(record, dict) and all(isinstance(key, str) and _is_info(info) for key, info in record.items())


def _is_info(info: Any) -> bool:
    if not isinstance(info, dict) or not {"shape", "dtype", "crc32"} <= info.keys():
        return False
    shape = info["shape"]
    known = isinstance(shape, list) and all(type(n) is int for n in shape)
    return known and isinstance(info["dtype"], str) and isinstance(info["crc32"], str)
