"""Mask files: `.npz` archives with an array for each parameter, such as MaskLLM's `mask_compressed.npz`.

MaskLLM (arXiv 2409.17481) packs the mask of the parameter `NAME` by `numpy.packbits`, in the parameter's own layout,
and stores it as `NAME.mask`. Arrays of the parameter's shape that hold 0 and 1 are read as well.

A file is a stranger's: nothing is unpickled, and no entry is unpacked before its size is known to be that of a mask.
"""

from __future__ import annotations

import math
import zipfile
import zlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from ..storage.codec import MaskFormatError


_SUFFIX = ".mask"
_HEADER = 2**14  # bytes that an array's header may take; NumPy writes 128
_READERS = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
_BROKEN = (zipfile.BadZipFile, zlib.error, EOFError, OSError, ValueError, RuntimeError, NotImplementedError)


class MaskFile:
    """Masks by name of the parameter.

    Args:
        label (`str`): what was given, for messages.
        path (`Path`): the file.

    Raises:
        MaskFormatError: it is no `.npz` file, or is damaged.
    """

    architecture = None

    def __init__(self, label: str, path: Path) -> None:
        self.label, self.nbytes = label, path.stat().st_size
        try:
            self._zip = zipfile.ZipFile(path)
        except _BROKEN as error:
            raise MaskFormatError(f"{label} is not an .npz file ({error}). Download it again.") from error
        self._entries: dict[str, zipfile.ZipInfo] = {}
        for entry in self._zip.infolist():
            name = entry.filename.removesuffix(".npy").removesuffix(_SUFFIX)
            if not entry.filename.endswith(".npy") or name in self._entries:
                raise MaskFormatError(
                    f"{label}: {entry.filename!r} is not an array, or is there twice. A mask file is what "
                    "numpy.savez or numpy.savez_compressed writes."
                )
            self._entries[name] = entry
        if not self._entries:
            raise MaskFormatError(f"{label} holds no masks.")

    def names(self) -> list[str]:
        """Names of parameters that have a mask."""
        return list(self._entries)

    def get(self, name: str, shape: Sequence[int]) -> torch.Tensor:
        """The mask of a parameter: bool, of the parameter's shape and layout.

        Args:
            name (`str`): name of the parameter.
            shape (`Sequence[int]`): its shape in the base model, which bounds what is unpacked.

        Raises:
            MaskFormatError: it is no mask of this shape, or damaged.
        """
        try:
            array = self._read(self._entries[name], math.prod(shape))
        except _BROKEN as error:
            raise MaskFormatError(
                f"{self.label}: the mask of {name!r}, which is {tuple(shape)} in the base model, cannot be "
                f"read: {error}."
            ) from error
        if array.ndim > 1 and array.shape != tuple(shape):
            raise MaskFormatError(
                f"{self.label}: the mask of {name!r} is {array.shape}, but the parameter is {tuple(shape)} in the "
                "base model: the mask belongs to another model."
            )
        return torch.from_numpy(np.ascontiguousarray(array).reshape(tuple(shape)))

    def _read(self, entry: zipfile.ZipInfo, size: int) -> np.ndarray:
        """An array of `size` bools: of one dimension if it was packed, otherwise as it was stored."""
        if entry.file_size > 8 * size + _HEADER:
            raise ValueError(f"it has {entry.file_size} bytes, more than a mask can")
        with self._zip.open(entry) as file:
            version = np.lib.format.read_magic(file)
            if version not in _READERS:
                raise ValueError(f"its NumPy format {version} is unknown")
            shape, by_columns, dtype = _READERS[version](file, max_header_size=_HEADER)
            count = math.prod(shape)
            packed = dtype == np.uint8 and count == (size + 7) // 8 != size
            fits = (packed or count == size) and min(shape, default=0) >= 0
            if dtype.kind not in "buif" or dtype.itemsize > 8 or not fits:
                raise ValueError(
                    f"an array of {count} elements of {dtype} is neither a mask ({size} elements, 0 or 1) nor one that "
                    f"numpy.packbits has packed ({(size + 7) // 8} bytes)"
                )
            data = file.read(count * dtype.itemsize + 1)  # one more, so that its end and its checksum are seen
        if len(data) != count * dtype.itemsize:
            raise ValueError(f"{len(data)} bytes are stored for {count} elements of {dtype}")
        array = np.frombuffer(data, dtype=dtype)
        if packed:
            return np.unpackbits(array, count=size).view(bool)
        if not ((array == 0) | (array == 1)).all():
            raise ValueError("it holds numbers other than 0 and 1")
        return (array != 0).reshape(shape, order="F" if by_columns else "C")
