"""Granularity: what is kept or removed as one."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Optional

import torch

from .topk import n_m_mask, topk_mask
from .warm_start import LastThreshold


@dataclass(frozen=True)
class NMGranularity:
    """`n` of every `m` consecutive weights along the input, the pattern that sparse tensor cores run."""

    n: int
    m: int

    @property
    def density(self) -> float:
        return self.n / self.m

    def check_shape(self, name: str, shape: tuple[int, int]) -> None:
        """Raise `ValueError` if the input width is no multiple of `m`."""
        if shape[1] % self.m:
            raise ValueError(
                f"granularity='{self.n}:{self.m}' needs an input width divisible by {self.m}, but {name!r} has "
                f"{shape[1]} inputs. Add it to `exclude_modules` or use granularity='weight'."
            )

    def block(self, shape: tuple[int, int]) -> tuple[int, int]:
        """Rows and columns that share a score: one weight."""
        return (1, 1)

    def units(
        self, scores: torch.Tensor, kept: int | torch.Tensor, last: Optional[LastThreshold] = None
    ) -> torch.Tensor:
        """Bool, the shape of `scores`, with `kept / numel · m` of every `m` along a row; `last` has no use here."""
        return n_m_mask(scores, int(kept) * self.m // scores.numel(), self.m)

    def count(self, density: float, shape: tuple[int, int]) -> int:
        """Number of weights kept at `density`; while the density falls, whole weights a group, rounded up."""
        # 1 - (1 - n/m) may lie a rounding error above n/m
        per_group = max(self.n, min(self.m, math.ceil(density * self.m - 1e-9)))
        return shape[0] * shape[1] // self.m * per_group


@dataclass(frozen=True)
class BlockGranularity:
    """Blocks of weights with one score each; a weight by itself is a block of 1×1.

    Args:
        rows, columns (`int`): size of a block; 0 stands for the whole of the matrix.
    """

    rows: int = 1
    columns: int = 1

    def block(self, shape: tuple[int, int]) -> tuple[int, int]:
        """Rows and columns of a block of an (out, in) matrix."""
        return self.rows or shape[0], self.columns or shape[1]

    def check_shape(self, name: str, shape: tuple[int, int]) -> None:
        """Raise `ValueError` if blocks do not divide the matrix."""
        height, width = self.block(shape)
        if shape[0] % height or shape[1] % width:
            raise ValueError(
                f"granularity='{height}x{width}' does not divide {name!r}, which is {shape[0]}x{shape[1]} (out x in). "
                "Add it to `exclude_modules`, or use another block."
            )

    def units(
        self, scores: torch.Tensor, kept: int | torch.Tensor, last: Optional[LastThreshold] = None
    ) -> torch.Tensor:
        """Bool, the shape of `scores`: the `kept` blocks with the largest scores."""
        return topk_mask(scores, kept, last)

    def count(self, density: float, shape: tuple[int, int]) -> int:
        """Number of weights of an (out, in) matrix in the blocks kept at `density`: of one block, at least."""
        height, width = self.block(shape)
        return max(1, round(density * (shape[0] * shape[1] // (height * width)))) * height * width


Granularity = NMGranularity | BlockGranularity
_NAMED = {"weight": BlockGranularity(), "row": BlockGranularity(1, 0), "column": BlockGranularity(0, 1)}
_SPELLINGS = "'weight', 'row', 'column', 'head', a block such as '32x32', or an n:m pattern such as '2:4'"


def parse_granularity(text: str) -> Granularity:
    """Read a granularity as a config spells it.

    Args:
        text (`str`): `"weight"`, `"row"`, `"column"`, rows × columns of a block such as `"32x32"`, or `"n:m"` such as
            `"2:4"`. (`"head"` is a block that depends on the module, see `tuners.heads`.)

    Raises:
        ValueError: the text is none of these.
    """
    if text in _NAMED:
        return _NAMED[text]
    match = re.fullmatch(r"(\d+)([:x])(\d+)", text) if isinstance(text, str) else None
    if match is None:
        raise ValueError(f"granularity={text!r} is unknown. Use {_SPELLINGS}.")
    first, second = int(match[1]), int(match[3])
    if match[2] == "x":
        if not (first and second):
            raise ValueError(f"granularity={text!r} must have at least one row and one column, such as '32x32'.")
        return BlockGranularity(first, second)
    if not 1 <= first < second:
        raise ValueError(f"granularity={text!r} must keep at least 1 and fewer than all {second} weights: 1 ≤ n < m.")
    return NMGranularity(first, second)


def pool(matrix: torch.Tensor, block: tuple[int, int]) -> torch.Tensor:
    """Sum of each block: shape (out, in) to (out / rows, in / columns)."""
    if block == (1, 1):
        return matrix
    rows, columns = matrix.shape
    return matrix.reshape(rows // block[0], block[0], columns // block[1], block[1]).sum((1, 3))


def spread(units: torch.Tensor, block: tuple[int, int]) -> torch.Tensor:
    """Every weight gets what its block has: inverse in shape of [`pool`]."""
    if block == (1, 1):
        return units
    return units.repeat_interleave(block[0], 0).repeat_interleave(block[1], 1)
