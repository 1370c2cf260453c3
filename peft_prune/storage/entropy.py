"""Entropy coding of masks: near the bound for independent bits, and below it where rows and columns differ.

Rows and columns are put into classes by how many weights they keep, and each cell (row class × column class) is coded
with a probability of its own: what training leaves is dense in some rows and columns and empty in others. The range
coder is the `constriction` library's. `docs/adapter_format.md` specifies every byte.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from typing import NamedTuple

import constriction
import numpy as np


ONE = 65535  # a cell's density is q / ONE
_TOTAL = 2**24  # frequencies of the 256 byte values sum to this
_BITS = np.array([bin(byte).count("1") for byte in range(256)])
_MAX_LOG_CLASSES = 4
_HEADER = 2


@lru_cache(maxsize=4096)
def byte_frequencies(q: int) -> tuple[int, ...]:
    """Integer frequencies of a byte with k set bits, k = 0 … 8, when bits are independent with probability q / 65535.

    Whole numbers throughout, so that every reader has the same table. A byte value's frequency is one more; what
    rounding leaves of 2**24 goes to byte 0 if q < 32768, to byte 255 otherwise (`byte_model` sees to both).
    """
    free = _TOTAL - 256
    return tuple(free * q**k * (ONE - q) ** (8 - k) // ONE**8 for k in range(9))


@lru_cache(maxsize=4096)
def byte_model(q: int) -> constriction.stream.model.Categorical:
    """The coder's model of one byte. Weights that sum to 2**24 - 256 are taken over exactly, each plus one."""
    weights = np.array(byte_frequencies(q), dtype=np.int64)[_BITS]
    weights[0 if q < 32768 else 255] += _TOTAL - 256 - weights.sum()
    return constriction.stream.model.Categorical(weights.astype(np.float32), perfect=False)


def _bounds(n: int, classes: int) -> np.ndarray:
    return np.arange(classes + 1) * n // classes


def _ranks(counts: np.ndarray) -> np.ndarray:
    """Position of each row (or column) when sorted by weights kept, equal ones by index."""
    order = np.argsort(counts, kind="stable")
    ranks = np.empty_like(order)
    ranks[order] = np.arange(len(order))
    return ranks


def _classes(counts: np.ndarray, log_classes: int) -> np.ndarray:
    """Class of each row: classes of equal size (but for rounding), from the emptiest to the densest."""
    bounds = _bounds(len(counts), 2**log_classes)
    return np.searchsorted(bounds[1:], _ranks(counts), side="right").astype(np.uint8)


def _index_bytes(n: int, log_classes: int) -> int:
    return (n * log_classes + 7) // 8


def _choose(mask: np.ndarray, row_counts: np.ndarray, column_counts: np.ndarray) -> tuple[int, int]:
    """Logarithms of the number of row and column classes that cost least."""
    rows, columns = mask.shape
    finest = 2**_MAX_LOG_CLASSES
    best = (float("inf"), 0, 0)
    row_class, column_class = _classes(row_counts, _MAX_LOG_CLASSES), _classes(column_counts, _MAX_LOG_CLASSES)
    # sums over row classes, then over column classes, as products with 0/1 matrices: exact in float32 up to 2**24
    in_row_class = (row_class == np.arange(finest)[:, None]).astype(np.float32)
    in_column_class = (column_class[:, None] == np.arange(finest)).astype(np.float32)
    ones = (in_row_class @ mask.view(np.uint8).astype(np.float32)).astype(float) @ in_column_class
    sizes = np.outer(in_row_class.sum(1), in_column_class.sum(0))
    for a in range(_MAX_LOG_CLASSES + 1):
        for b in range(_MAX_LOG_CLASSES + 1):
            shape = (2**a, finest >> a, 2**b, finest >> b)
            n, k = (t.reshape(shape).sum((1, 3)) for t in (sizes, ones))
            p = np.divide(k, n, out=np.zeros_like(k), where=n > 0).clip(1e-12, 1 - 1e-12)
            bits = -(n * (p * np.log2(p) + (1 - p) * np.log2(1 - p))).sum()
            cost = bits / 8 + 2 * 2 ** (a + b) + _index_bytes(rows, a) + _index_bytes(columns, b)
            best = min(best, (cost, a, b))
    return best[1], best[2]


def _pack_index(index: np.ndarray, width: int) -> bytes:
    bits = (index[:, None] >> np.arange(width, dtype=np.uint8)) & 1
    return np.packbits(bits.astype(np.uint8).reshape(-1), bitorder="little").tobytes()


def _unpack_index(data: np.ndarray, n: int, width: int) -> np.ndarray:
    bits = np.unpackbits(data, bitorder="little")[: n * width].reshape(n, width)
    return (bits << np.arange(width, dtype=np.uint8)).sum(1, dtype=np.uint8) if width else np.zeros(n, np.uint8)


def _cells(row_class: np.ndarray, column_class: np.ndarray, a: int, b: int) -> Iterator[tuple[slice, slice]]:
    """Slices of each cell in the matrix whose rows and columns are sorted by class."""
    row_ends = np.cumsum(np.bincount(row_class, minlength=2**a))
    column_ends = np.cumsum(np.bincount(column_class, minlength=2**b))
    for top, bottom in zip(np.r_[0, row_ends[:-1]], row_ends, strict=True):
        for left, right in zip(np.r_[0, column_ends[:-1]], column_ends, strict=True):
            yield slice(top, bottom), slice(left, right)


def encode(mask: np.ndarray) -> bytes:
    """Code a mask.

    Args:
        mask (`np.ndarray`): bool, shape (out, in), at least one weight.
    """
    row_counts, column_counts = mask.sum(1, dtype=np.int32), mask.sum(0, dtype=np.int32)
    a, b = _choose(mask, row_counts, column_counts)
    row_class, column_class = _classes(row_counts, a), _classes(column_counts, b)
    ordered = mask[np.argsort(row_class, kind="stable")] if a else mask
    ordered = ordered[:, np.argsort(column_class, kind="stable")] if b else ordered
    densities, coder = [], constriction.stream.queue.RangeEncoder()
    for rows, columns in _cells(row_class, column_class, a, b):
        cell = ordered[rows, columns]
        kept = int(cell.sum())
        q = 0 if kept == 0 else ONE if kept == cell.size else min(max(round(kept / cell.size * ONE), 1), ONE - 1)
        densities.append(q)
        if 0 < q < ONE:
            coder.encode(np.packbits(cell.reshape(-1), bitorder="little").astype(np.int32), byte_model(q))
    head = bytes([a, b]) + _pack_index(row_class, a) + _pack_index(column_class, b)
    return head + np.array(densities, dtype="<u2").tobytes() + coder.get_compressed().astype("<u4").tobytes()


def decode(data: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    """Inverse of [`encode`].

    Args:
        data (`np.ndarray`): uint8, one dimension.
        shape (`tuple[int, int]`): (out, in).

    Returns:
        `np.ndarray`: bool, of the given shape.

    Raises:
        ValueError: the bytes are no mask of this shape.
    """
    packed = decode_packed(data, shape)
    return np.unpackbits(packed, count=shape[0] * shape[1], bitorder="little").view(bool).reshape(shape)


def decode_packed(data: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    """[`decode`] at one bit per weight: uint8, shape (ceil(out · in / 8),), row-major, bits left over are 0.

    Raises:
        ValueError: the bytes are no mask of this shape.
    """
    code = _read(data, shape)
    if len(code.densities) == 1:  # one cell, which is packed row by row as the mask is
        packed = _decode_cell(code.coder, code.densities[0], shape[0] * shape[1])
    else:
        packed = np.packbits(_assemble(code, shape).reshape(-1), bitorder="little")
    if not code.coder.maybe_exhausted():
        raise ValueError("its entropy code has bytes left over")
    return packed


class _Code(NamedTuple):
    """The parts of an entropy code: the logarithms of the number of classes, the class of each row and column, `q` of
    each cell, and the range code.
    """

    a: int
    b: int
    row_class: np.ndarray
    column_class: np.ndarray
    densities: list[int]
    coder: constriction.stream.queue.RangeDecoder


def _read(data: np.ndarray, shape: tuple[int, int]) -> _Code:
    if len(data) < _HEADER or max(a := int(data[0]), b := int(data[1])) > _MAX_LOG_CLASSES:
        raise ValueError("the header of its entropy code is damaged")
    n_rows, n_columns = _index_bytes(shape[0], a), _index_bytes(shape[1], b)
    ends = np.cumsum([_HEADER, n_rows, n_columns, 2 * 2 ** (a + b)])
    if len(data) < ends[-1] or (len(data) - ends[-1]) % 4:
        raise ValueError("its entropy code is cut short")
    row_class = _unpack_index(data[ends[0] : ends[1]], shape[0], a)
    column_class = _unpack_index(data[ends[1] : ends[2]], shape[1], b)
    densities = np.frombuffer(data[ends[2] : ends[3]].tobytes(), dtype="<u2").tolist()
    words = np.frombuffer(data[ends[3] :].tobytes(), dtype="<u4").astype(np.uint32)
    return _Code(a, b, row_class, column_class, densities, constriction.stream.queue.RangeDecoder(words))


def _decode_cell(coder: constriction.stream.queue.RangeDecoder, q: int, size: int) -> np.ndarray:
    """The next cell of a range code: uint8, shape (ceil(size / 8),), bits left over are 0."""
    count = (size + 7) // 8
    if q in (0, ONE) or not size:
        packed = np.full(count, 255 if q else 0, dtype=np.uint8)
    else:
        try:
            packed = coder.decode(byte_model(q), count).astype(np.uint8)
        except (AssertionError, ValueError) as error:  # what the library raises for impossible data
            raise ValueError("its entropy code is damaged") from error
    if size % 8:
        packed[-1] &= (1 << size % 8) - 1
    return packed


def _assemble(code: _Code, shape: tuple[int, int]) -> np.ndarray:
    """The mask of several cells: bool, of the given shape."""
    ordered = np.zeros(shape, dtype=bool)
    for (rows, columns), q in zip(
        _cells(code.row_class, code.column_class, code.a, code.b), code.densities, strict=True
    ):
        cell = ordered[rows, columns]
        if q and cell.size:
            bits = np.unpackbits(_decode_cell(code.coder, q, cell.size), count=cell.size, bitorder="little")
            cell[:] = bits.view(bool).reshape(cell.shape)
    if code.a:
        ordered = ordered.take(_places(code.row_class), axis=0)
    return ordered.take(_places(code.column_class), axis=1) if code.b else ordered


def _places(classes: np.ndarray) -> np.ndarray:
    """Where each row (or column) is when they are sorted by class."""
    return np.argsort(np.argsort(classes, kind="stable"))
