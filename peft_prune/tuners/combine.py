"""New masks from old ones: union, intersection, majority vote."""

from __future__ import annotations

from collections.abc import Sequence

import torch


COMBINATIONS = ("union", "intersection", "majority")


def combine_masks(masks: Sequence[torch.Tensor], how: str, weights: Sequence[float]) -> torch.Tensor:
    """Combine masks of one matrix.

    Args:
        masks (`Sequence[torch.Tensor]`): bool, the same shape.
        how (`str`): `"union"` keeps what any mask keeps, `"intersection"` what all keep, `"majority"` what more than
            half of the votes keep.
        weights (`Sequence[float]`): votes of each mask, for `"majority"`.

    Returns:
        `torch.Tensor`: bool, of that shape.
    """
    if how == "majority":
        votes = sum(mask.double() * weight for mask, weight in zip(masks, weights, strict=True))
        return votes > sum(weights) / 2  # type: ignore[operator, return-value]
    stacked = torch.stack(list(masks))
    return stacked.any(0) if how == "union" else stacked.all(0)
