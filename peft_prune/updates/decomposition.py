"""Low-rank plus sparse: the places of a matrix that no matrix of low rank explains (DSEE, Chen et al. 2023).

Bilateral smoothing (GreBsmo, Zhou & Tao 2013) with rank and number of places bounded, as in GoDec by the same authors.
The greedy rise of the rank is replaced by directions carried along beyond the rank: they make the subspace converge,
before places are first chosen, so that two seeds choose the same ones.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Decomposition:
    """`W ≈ U · V + S`, for a batch of matrices.

    Attributes:
        left (`torch.Tensor`): `U`, float32, shape (batch, out, rank), orthonormal columns.
        right (`torch.Tensor`): `V`, float32, shape (batch, rank, in).
        places (`torch.Tensor`): flat positions of `S`, int64, shape (batch, num_sparse), ascending.
        values (`torch.Tensor`): what `S` is there, float32, shape (batch, num_sparse).
        residual (`torch.Tensor`): `‖W − UV − S‖ / ‖W‖` (Frobenius), float32, shape (batch,).
    """

    left: torch.Tensor
    right: torch.Tensor
    places: torch.Tensor
    values: torch.Tensor
    residual: torch.Tensor


@torch.no_grad()
def decompose(
    matrices: torch.Tensor, rank: int, num_sparse: int, rounds: int = 3, iterations: int = 8, seed: int = 0
) -> Decomposition:
    """Split matrices of one shape into a part of low rank and a few places.

    In each round, `iterations` times `U ← orth((W − S)Vᵀ)`, `V ← Uᵀ(W − S)`; then `UV` is cut to its `rank` largest
    singular values, and `S` becomes the `num_sparse` largest entries of `W − UV`.

    Args:
        matrices (`torch.Tensor`): floating point, shape (batch, out, in), on any device.
        rank (`int`): rank of `UV`, at most the smaller side.
        num_sparse (`int`): number of places of each matrix.
        rounds (`int`): how often the places are chosen again.
        iterations (`int`): steps of smoothing in a round; in the first three times as many.
        seed (`int`): seed of the directions to begin with.

    Raises:
        ValueError: an argument is out of range.
    """
    batch, rows, columns = _check(matrices, rank, num_sparse, rounds, iterations)
    weight = matrices.detach().float()
    dense = weight.clone()  # W - S
    width = min(3 * rank, rows, columns)
    # drawn on the CPU, so that every device has the same
    start = torch.randn(batch, width, columns, generator=torch.Generator().manual_seed(seed))
    right = start.to(weight.device)
    for i in range(rounds):
        for _ in range(iterations if i else 3 * iterations):
            left = torch.linalg.qr(dense @ right.mT).Q
            right = left.mT @ dense
        turn, sizes, directions = torch.linalg.svd(right, full_matrices=False)
        low_left = left @ turn[..., :rank]
        low_right = sizes[..., :rank, None] * directions[..., :rank, :]
        rest = (weight - low_left @ low_right).flatten(1)
        places = rest.abs().topk(num_sparse, dim=1, sorted=False).indices.sort(dim=1).values
        values = rest.gather(1, places)
        dense.copy_(weight)
        dense.flatten(1).scatter_(1, places, weight.flatten(1).gather(1, places) - values)
    norm = weight.flatten(1).norm(dim=1).clamp_min(torch.finfo(torch.float32).tiny)
    residual = rest.scatter(1, places, 0.0).norm(dim=1) / norm
    return Decomposition(low_left, low_right, places, values, residual)


def _check(matrices: torch.Tensor, rank: int, num_sparse: int, rounds: int, iterations: int) -> tuple[int, int, int]:
    if matrices.dim() != 3:
        raise ValueError(f"matrices must have the shape (batch, out, in), not {tuple(matrices.shape)}. Stack them.")
    batch, rows, columns = matrices.shape
    if not 1 <= rank <= min(rows, columns):
        raise ValueError(f"rank={rank!r} must lie between 1 and the smaller side of the matrix, {min(rows, columns)}.")
    if not 1 <= num_sparse <= rows * columns:
        raise ValueError(
            f"num_sparse={num_sparse!r} must lie between 1 and the {rows * columns} weights of the matrix."
        )
    for name, value in (("rounds", rounds), ("iterations", iterations)):
        if value < 1:
            raise ValueError(f"{name}={value!r} must be positive.")
    return batch, rows, columns
