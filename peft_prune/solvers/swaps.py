"""A better mask for weights that stay as they are: SparseSwaps (Zimmer et al. 2025, arXiv 2512.10922)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Optional

import torch
from torch.nn import functional as F

from .checks import check_problem, check_whole
from .gram import row_losses
from .pattern import check_groups


_LEAST = 1e-6  # of a row's loss: what a swap has to gain, so that rounding cannot go round in circles


def improve_mask(
    weight: torch.Tensor,
    mask: torch.Tensor,
    gram: torch.Tensor,
    steps: int = 100,
    groups: Optional[tuple[int, int]] = None,
    candidates: int = 8,
) -> torch.Tensor:
    """Swap kept weights for removed ones as long as that lowers the loss of a row, for all rows at once.

    With e a row of what is removed, its loss is `e G eᵀ`. Removing p changes it by `2 w_p (eG)_p + w_p² G_pp`, bringing
    q back by `−2 w_q (eG)_q + w_q² G_qq`, both together by `−2 w_p w_q G_pq` more. A step looks at all pairs of the
    `candidates` best p and q of each row and takes the best pair, again and again until none gains, each time with the
    exact gain after those before. With groups, a step does so with the best swap of each of the `candidates` groups
    that gain most. It ends when no such swap gains, in any row.

    Args:
        weight (`torch.Tensor`): floating point, shape (out, in).
        mask (`torch.Tensor`): bool, the same shape: what stays.
        gram (`torch.Tensor`): float32 or float64, shape (in, in); its dtype is that of the arithmetic.
        steps (`int`): most steps.
        groups (`tuple[int, int]`, *optional*): (n, m), swaps inside groups of m weights only.
        candidates (`int`): see above. More of them find a little more and take longer.

    Returns:
        `torch.Tensor`: bool, shape (out, in), with as many weights in each row (or group) as before. No row has a
        larger loss than before.

    Raises:
        ValueError: an argument is out of range, shapes do not fit, or a tensor is not finite.
    """
    check_problem(weight, gram, mask)
    check_whole("steps", steps, 0)
    check_whole("candidates", candidates, 1)
    w = weight.detach().to(gram)
    removed = w.masked_fill(mask, 0.0)
    effect = removed @ gram
    before = (effect * removed).sum(1)
    rows = _Rows(torch.arange(len(w), device=w.device), w, 2 * mask.to(w) - 1, effect, _LEAST * before)
    if groups is not None:
        check_groups(groups, w.shape[1])
    better = _swap(rows, gram, steps, candidates, None if groups is None else groups[1])
    worse = row_losses(w.masked_fill(better, 0.0), gram) > before
    return torch.where(worse[:, None], mask, better)


@dataclass
class _Rows:
    """Rows that still gain.

    Attributes:
        numbers (`torch.Tensor`): which rows they are: int64, (rows,).
        w, sign, effect (`torch.Tensor`): weights; 1 for what stays and −1 for what is removed; `eG`. Float, (rows, in).
        least (`torch.Tensor`): what a swap has to gain: float, (rows,).
    """

    numbers: torch.Tensor
    w: torch.Tensor
    sign: torch.Tensor
    effect: torch.Tensor
    least: torch.Tensor

    def only(self, some: torch.Tensor) -> _Rows:
        """Some of the rows (bool, shape (rows,))."""
        return _Rows(*(part[some] for part in (self.numbers, self.w, self.sign, self.effect, self.least)))

    def costs(self, squares: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """What removing each kept weight, and bringing back each removed one costs; very much for the others."""
        never = torch.finfo(self.w.dtype).max / 8  # arithmetic is many times as fast as torch's masks on a CPU
        cost = (self.effect * self.sign).mul_(2).addcmul_(self.w, squares).mul_(self.w)
        return cost.add(1 - self.sign, alpha=never), cost.add(1 + self.sign, alpha=never)


def _swap(rows: _Rows, gram: torch.Tensor, steps: int, candidates: int, size: Optional[int]) -> torch.Tensor:
    """The mask after all steps; `size` is that of groups, if swaps are to stay inside them."""
    result = rows.sign.clone()
    for _ in range(steps):
        moves = _moves_in_rows if size is None else _moves_in_groups
        places, moved = moves(rows, gram, candidates, size or 0)
        gained = moved.any(1)
        if not bool(gained.any()):
            break
        half = places.shape[1] // 2
        delta = rows.w.gather(1, places) * moved
        delta[:, half:] *= -1  # what comes back leaves e
        rows.effect += F.embedding_bag(places, gram, per_sample_weights=delta, mode="sum")
        row, place = moved.nonzero(as_tuple=True)
        rows.sign[row, places[row, place]] *= -1
        result[rows.numbers] = rows.sign
        if int(gained.sum()) < 0.8 * len(gained):
            rows = rows.only(gained)
    return result > 0


def _together(rows: _Rows, gram: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
    """`w_i w_j G_ij` of some places of each row: (rows, places) to (rows, places, places)."""
    w = rows.w.gather(1, places)
    flat = places[:, :, None] * len(gram) + places[:, None, :]
    found = gram.reshape(-1).index_select(0, flat.view(-1)).view(flat.shape)
    return found.mul_(w[:, None, :]).mul_(w[:, :, None])


def _moves_in_rows(rows: _Rows, gram: torch.Tensor, k: int, size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The best of all pairs of the k best p and q of each row, again and again; a weight moves once.

    Returns:
        `tuple[torch.Tensor, torch.Tensor]`: the places looked at, int64, (rows, 2k), those to remove first; and which
        are swapped, bool, the same shape.
    """
    k = min(k, rows.w.shape[1])
    out, back = rows.costs(gram.diagonal())
    out, p = out.topk(k, largest=False)
    back, q = back.topk(k, largest=False)
    places, costs = torch.cat([p, q], 1), torch.cat([out, back], 1)
    together = _together(rows, gram, places)
    twice = 2 * together[:, :k, k:]
    sign = torch.ones_like(costs[0])
    sign[k:] = -1
    numbers, moved = torch.arange(len(costs), device=costs.device), torch.zeros_like(costs, dtype=torch.bool)
    for _ in range(k):
        change, best = (costs[:, :k, None] + costs[:, None, k:] - twice).flatten(1).min(1)
        active = change < -rows.least
        if not bool(active.any()):
            break
        i, j = best // k, best % k + k
        moved[numbers, i] |= active
        moved[numbers, j] |= active
        costs += 2 * sign * (together[numbers, i] - together[numbers, j]) * active[:, None]
        costs.masked_fill_(moved, torch.inf)
    return places, moved


def _moves_in_groups(rows: _Rows, gram: torch.Tensor, k: int, size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The best swap of each of the k groups of a row that gain most, the best first, as long as they gain.

    Args and returns are those of [`_moves_in_rows`].
    """
    k = min(k, rows.w.shape[1] // size)
    changes, p, q = _best_in_groups(rows, gram, size)
    changes, groups = changes.topk(k, largest=False)
    places = torch.cat([p.gather(1, groups), q.gather(1, groups)], 1)
    t = _together(rows, gram, places)
    twice = 2 * (t[:, :k, :k] - t[:, :k, k:] - t[:, k:, :k] + t[:, k:, k:])
    numbers, moved = torch.arange(len(t), device=t.device), torch.zeros_like(changes, dtype=torch.bool)
    for _ in range(k):
        change, best = changes.min(1)
        active = change < -rows.least
        if not bool(active.any()):
            break
        moved[numbers, best] |= active
        changes += twice[numbers, best] * active[:, None]
        changes.masked_fill_(moved, torch.inf)
    return places, moved.repeat(1, 2)


def _best_in_groups(rows: _Rows, gram: torch.Tensor, size: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The best swap inside each group: what it changes, and the places p and q, all (rows, groups)."""
    shape = (len(rows.w), -1, size)
    out, back = (cost.view(shape) for cost in rows.costs(gram.diagonal()))
    w, start = rows.w.view(shape), torch.arange(0, rows.w.shape[1], size, device=rows.w.device)
    inside = start[:, None] + torch.arange(size, device=start.device)
    blocks = 2 * gram[inside[:, :, None], inside[:, None, :]]
    best = torch.full_like(w[:, :, 0], torch.inf)
    p, q = torch.zeros_like(best, dtype=torch.int64), torch.zeros_like(best, dtype=torch.int64)
    for i in range(size):
        change, j = (back - w[:, :, i, None] * blocks[:, i] * w).min(2)
        change += out[:, :, i]
        better = change < best
        best, p, q = torch.where(better, change, best), p.masked_fill(better, i), torch.where(better, j, q)
    return best, p + start, q + start
