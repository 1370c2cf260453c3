"""Where the trained places of a sparse update are (DSEE, Chen et al. 2023, section 3.2)."""

from __future__ import annotations

import torch

from .decomposition import decompose


SUPPORTS = ("grebsmo", "random", "magnitude")


def choose_support(matrix: torch.Tensor, kind: str, rank: int, num_sparse: int, seed: int) -> torch.Tensor:
    """Flat positions of the trained places of a matrix.

    Args:
        matrix (`torch.Tensor`): floating point, shape (out, in).
        kind (`str`): `"grebsmo"` (what no matrix of low rank explains), `"magnitude"` or `"random"`.
        rank (`int`): bound of the rank for `"grebsmo"`.
        num_sparse (`int`): number of places.
        seed (`int`): seed for `"grebsmo"` and `"random"`.

    Returns:
        `torch.Tensor`: int64, ascending, shape (num_sparse,).

    Raises:
        ValueError: the matrix has fewer weights.
    """
    if num_sparse > matrix.numel():
        raise ValueError(f"num_sparse={num_sparse!r} is more than the {matrix.numel()} weights of a matrix.")
    if kind == "grebsmo":
        return decompose(matrix[None], min(rank, *matrix.shape), num_sparse, seed=seed).places[0]
    if kind == "magnitude":
        return matrix.abs().flatten().topk(num_sparse).indices.sort().values
    generator = torch.Generator().manual_seed(seed)
    return torch.randperm(matrix.numel(), generator=generator)[:num_sparse].sort().values.to(matrix.device)
