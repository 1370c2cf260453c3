"""One matrix of a sparse model beside that of its base: what is kept, and whether kept weights are the base's."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Optional

import torch


_GROUPS = (4, 8, 16)
# kept places of an n:m pattern that may be zero: values that solvers find are rounded to float16, a few of them to 0
_UNUSED = 1e-3
# cosine of kept weights before and after: solvers and fine-tuning leave it near 1, matrices of two models have 0
_ALIKE = 0.5


@dataclass(frozen=True)
class Comparison:
    """
    Attributes:
        kept (`torch.Tensor`): where the sparse matrix is not zero: bool, shape (out, in).
        removed (`int`): weights that are zero there, and not in the base.
        changed (`int`): kept weights that are not the base's.
        unlike (`bool`): whether kept weights have little in common with the base's, as those of another model.
        rounded (`bool`): whether kept weights are the base's, and some only up to the rounding of the narrower dtype.
        values (`torch.Tensor`, *optional*): the sparse matrix, if kept weights are not the base's.
    """

    kept: torch.Tensor
    removed: int
    changed: int = 0
    unlike: bool = False
    rounded: bool = False
    values: Optional[torch.Tensor] = None


def agree(base: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """Where two tensors of floating point are equal, up to rounding to the dtype of either.

    A weight that was rounded when a checkpoint was saved is not one that was changed. What rounds to the base's weight
    is the base's weight as well: in the base's dtype there is nothing between the two.

    Returns:
        `torch.Tensor`: bool, of their shape.
    """
    same = base.to(other.dtype) == other
    rest = ~same
    if base.dtype != other.dtype and bool(rest.any()):
        same[rest] = _rounds_to(base[rest], other[rest])
    return same


def _rounds_to(base: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """Where the base's number is the other one, rounded, or both may be roundings of a third."""
    same = base == other.to(base.dtype)
    if {base.dtype, other.dtype} == {torch.float16, torch.bfloat16}:
        half, brain = (base, other) if base.dtype == torch.float16 else (other, base)
        same |= _rounded_twice(half.float(), brain)
    return same


def _rounded_twice(half: torch.Tensor, brain: torch.Tensor) -> torch.Tensor:
    """Where a float16 and a bfloat16 number may be rounded from one float32 number.

    The first may lie halfway between two of bfloat16, which then rounds the other way; where it is subnormal, it has
    an absolute error. A nudge of a quarter of its last place decides nothing else.
    """
    found = (half - brain.float()).abs() <= 2.0**-24
    for nudge in (2.0**-12, -(2.0**-12)):
        found |= (half * (1 + nudge)).bfloat16() == brain
    return found


def all_agree(base: torch.Tensor, other: torch.Tensor, at_once: int = 2**24) -> bool:
    """Whether [`agree`] holds everywhere, with little memory; other dtypes than floating point have to be equal."""
    if not (base.is_floating_point() and other.is_floating_point()):
        return torch.equal(base, other.to(base.device))
    pairs = zip(base.reshape(-1).split(at_once), other.reshape(-1).split(at_once), strict=True)
    return all(bool(agree(one, two.to(one.device)).all()) for one, two in pairs)


def compare(base: torch.Tensor, sparse: torch.Tensor) -> Comparison:
    """Compare two matrices, (out, in), of floating point. What is zero in the sparse one counts as removed.

    Raises:
        ValueError: the sparse one is not finite.
    """
    if not bool(torch.isfinite(sparse).all()):
        raise ValueError("it holds NaN or infinity. The checkpoint is damaged: download or save it again")
    kept = (sparse != 0).contiguous()
    removed = int((~kept & (base.to(sparse.dtype) != 0)).sum())
    one, two = base[kept], sparse[kept]
    changed = int((~agree(one, two)).sum())
    if changed:
        unlike = bool(torch.nn.functional.cosine_similarity(one.float(), two.float(), dim=0) < _ALIKE)
        return Comparison(kept, removed, changed, unlike, values=sparse)
    wide = torch.promote_types(base.dtype, sparse.dtype)
    rounded = base.dtype != sparse.dtype and bool((one.to(wide) != two.to(wide)).any())
    return Comparison(kept, removed, rounded=rounded)


def group_pattern(mask: torch.Tensor) -> Optional[str]:
    """The n:m pattern of a mask, such as `"2:4"`; `None` if it has none.

    No group of m along the input keeps more than n, and of the places that a pattern has at most one in a thousand is
    not used.

    Args:
        mask (`torch.Tensor`): bool, shape (out, in).
    """
    for m in _GROUPS:
        if mask.shape[1] % m:
            continue
        groups = mask.reshape(-1, m).sum(1, dtype=torch.uint8)
        n, places = int(groups.max()), groups.numel() * int(groups.max())
        if 0 < n < m and int(groups.sum(dtype=torch.int64)) >= (1 - _UNUSED) * places:
            return f"{n}:{m}"
    return None
