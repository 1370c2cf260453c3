"""The code of n:m masks: a byte holds whole groups, and all bytes in which each group keeps n are equally likely.

A group of 2:4 then takes log2(6) bits, 0.65 a weight. `docs/adapter_format.md` specifies every byte.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Optional

import constriction
import numpy as np


SIZES = (2, 4, 8)  # of groups that never cross the end of a byte
_TOTAL = 2**24  # frequencies of the 256 byte values sum to this
_HEADER = 2


def pattern_of(mask: np.ndarray) -> Optional[tuple[int, int]]:
    """(n, m) if a mask, bool of shape (out, in), keeps n of every m neighbours in a row, otherwise `None`."""
    for m in SIZES:
        if mask.shape[1] % m == 0:
            counts = mask.reshape(-1, m).sum(1, dtype=np.uint8)
            if 0 < (n := int(counts[0])) < m and bool((counts == n).all()):
                return n, m
    return None


@lru_cache
def fitting(n: int, m: int) -> np.ndarray:
    """Which of the 256 byte values keep n in each of their groups: bool, shape (256,)."""
    bits = np.unpackbits(np.arange(256, dtype=np.uint8)[:, None], axis=1, bitorder="little")
    return np.asarray((bits.reshape(256, -1, m).sum(2) == n).all(1))


@lru_cache
def byte_model(n: int, m: int) -> constriction.stream.model.Categorical:
    """The coder's model of one byte. Weights that sum to 2**24 - 256 are taken over exactly, each plus one."""
    fits, free = fitting(n, m), _TOTAL - 256
    weights = fits * (free // int(fits.sum()))
    weights[int(fits.argmax())] += free - int(weights.sum())
    return constriction.stream.model.Categorical(weights.astype(np.float32), perfect=False)


def encode(mask: np.ndarray, n: int, m: int) -> bytes:
    """Code a mask, bool of shape (out, in), whose [`pattern_of`] is (n, m)."""
    coder = constriction.stream.queue.RangeEncoder()
    coder.encode(np.packbits(mask.reshape(-1), bitorder="little").astype(np.int32), byte_model(n, m))
    return bytes([n, m]) + coder.get_compressed().astype("<u4").tobytes()


def decode_packed(data: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    """Inverse of [`encode`], at one bit per weight.

    Args:
        data (`np.ndarray`): uint8, one dimension.
        shape (`tuple[int, int]`): (out, in).

    Returns:
        `np.ndarray`: uint8, shape (ceil(out · in / 8),), row-major, bits left over are 0.

    Raises:
        ValueError: the bytes are no such mask of this shape.
    """
    n, m = data[:_HEADER].tolist() if len(data) >= _HEADER else (0, 0)
    if m not in SIZES or not 0 < n < m or shape[1] % m or (len(data) - _HEADER) % 4:
        raise ValueError("the header of its n:m code is damaged, or does not fit the shape")
    size = shape[0] * shape[1]
    words = np.frombuffer(data[_HEADER:].tobytes(), dtype="<u4").astype(np.uint32)
    coder = constriction.stream.queue.RangeDecoder(words)
    try:
        packed = coder.decode(byte_model(n, m), (size + 7) // 8).astype(np.uint8)
    except (AssertionError, ValueError) as error:  # what the library raises for impossible data
        raise ValueError("its n:m code is damaged") from error
    if size % 8:
        packed[-1] &= (1 << size % 8) - 1
    last = np.unpackbits(packed[-1:], count=size % 8 or 8, bitorder="little").reshape(-1, m)
    if not (coder.maybe_exhausted() and fitting(n, m)[packed[:-1]].all() and (last.sum(1) == n).all()):
        raise ValueError(f"its n:m code is damaged: not every {m} weights keep {n}, or bytes are left over")
    return packed
