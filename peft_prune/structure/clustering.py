"""Which of two similar units to remove, and in which order (P-pruning, Wang et al. 2024, sections 3.1 and 3.2)."""

from __future__ import annotations

import numpy as np
import torch
from scipy.cluster.hierarchy import linkage as cluster
from scipy.optimize import linear_sum_assignment
from scipy.spatial.distance import squareform


MATCHINGS = ("assignment", "greedy")
LINKAGES = ("complete", "average", "single")
_DEAD = 1e-12


def column_similarity(activations: torch.Tensor) -> torch.Tensor:
    """`|cos|` of every two columns.

    Columns that are all zero are like each other and unlike any other.

    Args:
        activations (`torch.Tensor`): floating point, shape (tokens, columns).

    Returns:
        `torch.Tensor`: float32, shape (columns, columns), 1 on the diagonal.
    """
    columns = activations.float()
    norms = columns.norm(dim=0)
    dead = norms <= _DEAD
    columns = columns / norms.clamp_min(_DEAD)
    similarity = (columns.T @ columns).abs_().clamp_(max=1.0)
    if bool(dead.any()):
        similarity[dead.unsqueeze(0) & dead.unsqueeze(1)] = 1.0
    return similarity.fill_diagonal_(1.0)


def head_similarity(activations: torch.Tensor, width: int, matching: str = "assignment") -> torch.Tensor:
    """Similarity of every two heads: their dimensions are matched one to one, and the `|cos|` of the pairs averaged.

    Args:
        activations (`torch.Tensor`): floating point, shape (tokens, heads · width), the heads side by side.
        width (`int`): columns of a head.
        matching (`str`): `"assignment"`, the best matching, or `"greedy"`, the largest value first (the paper's).

    Returns:
        `torch.Tensor`: float32, shape (heads, heads), 1 on the diagonal.
    """
    heads = activations.shape[1] // width
    similarity = column_similarity(activations).view(heads, width, heads, width).transpose(1, 2)
    first, second = torch.triu_indices(heads, heads, offset=1, device=activations.device)
    pairs = similarity[first, second]  # (pairs, width, width)
    means = _match_greedily(pairs) if matching == "greedy" else _match_best(pairs)
    result = torch.eye(heads, device=activations.device)
    result[first, second] = means
    result[second, first] = means
    return result


def _match_greedily(pairs: torch.Tensor) -> torch.Tensor:
    """Mean over a greedy matching, of all pairs of heads at once: shape (pairs, width, width) to (pairs,)."""
    left = pairs.clone()
    total = left.new_zeros(len(left))
    width = left.shape[1]
    for _ in range(width):
        best, place = left.flatten(1).max(dim=1)
        total += best
        row, column = place // width, place % width
        left.scatter_(1, row.view(-1, 1, 1).expand(-1, 1, width), -1.0)
        left.scatter_(2, column.view(-1, 1, 1).expand(-1, width, 1), -1.0)
    return total / width


def _match_best(pairs: torch.Tensor) -> torch.Tensor:
    """Mean over the matching with the largest sum: shape (pairs, width, width) to (pairs,)."""
    means = [matrix[linear_sum_assignment(matrix, maximize=True)].mean() for matrix in pairs.cpu().numpy()]
    return torch.tensor(np.array(means), dtype=torch.float32, device=pairs.device)


def removal_order(
    similarity: torch.Tensor, importance: torch.Tensor, linkage: str = "complete"
) -> tuple[np.ndarray, np.ndarray]:
    """In which order units go when similar ones are clustered and of each cluster the most important one stays.

    Each merge of two clusters removes the less important of their two representatives. So cutting the tree at a height
    removes the units whose heights are below it, and one unit always stays.

    Args:
        similarity (`torch.Tensor`): shape (units, units), 1 on the diagonal.
        importance (`torch.Tensor`): shape (units,).
        linkage (`str`): `"complete"`, `"average"` or `"single"`.

    Returns:
        `tuple[np.ndarray, np.ndarray]`: heights, ascending, and the unit removed at each; both of shape (units - 1,).
    """
    units = len(importance)
    if units < 2:
        return np.zeros(0), np.zeros(0, dtype=np.int64)
    distance = 1.0 - similarity.double().cpu().numpy()
    # the condensed form: a square matrix would be taken for observations
    tree = cluster(squareform(distance, checks=False), method=linkage)
    values = importance.double().cpu().numpy()
    representative = list(range(units))
    removed = np.empty(units - 1, dtype=np.int64)
    for i, (one, two) in enumerate(tree[:, :2].astype(np.int64)):
        a, b = representative[one], representative[two]
        keep, removed[i] = (a, b) if (values[a], -a) >= (values[b], -b) else (b, a)
        representative.append(keep)
    return tree[:, 2], removed


def least_first(importance: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
    """The order when the least important units go first and the most important one stays; as [`removal_order`]."""
    values = importance.double().cpu().numpy()
    order = np.argsort(values, kind="stable")[:-1]
    return values[order], order
