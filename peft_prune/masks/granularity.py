"""Granularity: what is kept or removed as one."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

import torch

from .selection import n_m_mask, topk_mask


@dataclass(frozen=True)
class WeightGranularity:
    """Every weight by itself."""

    def check_shape(self, name: str, shape: tuple[int, int]) -> None:
        """Every shape will do."""

    def mask(self, scores: torch.Tensor, kept: int) -> torch.Tensor:
        """Bool mask, shape (out, in), of the `kept` largest scores."""
        return topk_mask(scores, kept)

    def count(self, density: float, shape: tuple[int, int]) -> int:
        """Number of weights of an (out, in) matrix kept at `density`."""
        return round(density * (shape[0] * shape[1]))


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

    def mask(self, scores: torch.Tensor, kept: int) -> torch.Tensor:
        """Bool mask, shape (out, in), with `kept / numel * m` of every `m` weights."""
        return n_m_mask(scores, kept * self.m // scores.numel(), self.m)

    def count(self, density: float, shape: tuple[int, int]) -> int:
        """Number of weights kept at `density`; while the density falls, whole weights a group, rounded up."""
        # 1 - (1 - n/m) may lie a rounding error above n/m
        per_group = max(self.n, min(self.m, math.ceil(density * self.m - 1e-9)))
        return shape[0] * shape[1] // self.m * per_group


@dataclass(frozen=True)
class ColumnGranularity:
    """Whole columns, that is inputs: the heads side by side, or neurons."""

    def check_shape(self, name: str, shape: tuple[int, int]) -> None:
        """Every shape will do."""

    def mask(self, scores: torch.Tensor, kept: int) -> torch.Tensor:
        """Bool mask, shape (out, in), of the columns with the largest mean score."""
        columns = topk_mask(scores.mean(0), kept // scores.shape[0])
        return columns.expand_as(scores).contiguous()

    def count(self, density: float, shape: tuple[int, int]) -> int:
        """Number of weights in the columns kept at `density`."""
        return round(density * shape[1]) * shape[0]


Granularity = WeightGranularity | NMGranularity | ColumnGranularity


def parse_granularity(text: str) -> Granularity:
    """Read a granularity as a config spells it.

    Args:
        text (`str`): `"weight"`, or `"n:m"` such as `"2:4"`.

    Raises:
        ValueError: the text is neither.
    """
    if text == "weight":
        return WeightGranularity()
    if text == "column":
        return ColumnGranularity()
    match = re.fullmatch(r"(\d+):(\d+)", text) if isinstance(text, str) else None
    if match is None:
        raise ValueError(f"granularity={text!r} is unknown. Use 'weight' or an n:m pattern such as '2:4'.")
    n, m = int(match[1]), int(match[2])
    if not 1 <= n < m:
        raise ValueError(f"granularity={text!r} must keep at least 1 and fewer than all {m} weights: use 1 ≤ n < m.")
    return NMGranularity(n, m)
