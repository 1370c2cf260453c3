"""Low-rank plus sparse, on matrices that are just that."""

import pytest
import torch

from peft_prune.updates.decomposition import decompose


def planted(batch=3, rows=96, columns=128, rank=6, places=40, noise=0.0, seed=0):
    generator = torch.Generator().manual_seed(seed)
    low = torch.randn(batch, rows, rank, generator=generator) @ torch.randn(batch, rank, columns, generator=generator)
    support = torch.stack([torch.randperm(rows * columns, generator=generator)[:places] for _ in range(batch)])
    values = 20 * (2 * torch.randint(0, 2, (batch, places), generator=generator) - 1.0)
    sparse = torch.zeros(batch, rows * columns).scatter_(1, support, values).view_as(low)
    return low + sparse + noise * torch.randn(low.shape, generator=generator), support.sort(1).values, values


@pytest.mark.parametrize("noise", [0.0, 0.3])
@pytest.mark.parametrize("shape", [(96, 128), (128, 96), (384, 384)])
def test_a_planted_support_is_found(noise, shape):
    matrices, support, _ = planted(rows=shape[0], columns=shape[1], noise=noise)
    found = decompose(matrices, rank=6, num_sparse=40, rounds=8)
    assert torch.equal(found.places, support)
    assert torch.equal(decompose(matrices, rank=6, num_sparse=40).places, support)
    if not noise:
        assert float(found.residual.max()) < 1e-3


def test_what_is_returned_is_what_it_says():
    matrices, _, _ = planted(noise=0.5)
    found = decompose(matrices, rank=4, num_sparse=25)
    identity = torch.eye(4).expand(3, 4, 4)
    torch.testing.assert_close(found.left.transpose(1, 2) @ found.left, identity, atol=1e-5, rtol=0)
    rest = matrices - found.left @ found.right
    for i in range(3):
        order = rest[i].flatten().abs().argsort(descending=True)[:25]
        assert set(order.tolist()) == set(found.places[i].tolist()), "the largest of what the low rank leaves"
        torch.testing.assert_close(rest[i].flatten()[found.places[i]], found.values[i])
        left_over = rest[i].flatten().clone()
        left_over[found.places[i]] = 0
        torch.testing.assert_close(found.residual[i], left_over.norm() / matrices[i].norm(), atol=1e-4, rtol=1e-3)


def test_seeds_agree_and_batches_do_not_mix():
    matrices, _, _ = planted(rows=384, columns=384, rank=24, places=64, noise=1.0)
    one, two = (decompose(matrices, 16, 64, seed=seed) for seed in (0, 1))
    for a, b in zip(one.places, two.places, strict=True):
        assert len(set(a.tolist()) & set(b.tolist())) >= 58  # 90 % of 64
    assert torch.equal(decompose(matrices, 16, 64, seed=0).places, one.places)
    first = decompose(matrices[:1], 16, 64)
    assert len(set(first.places[0].tolist()) & set(one.places[0].tolist())) >= 58


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"rank": 0}, "rank=0"),
        ({"rank": 97}, "rank=97 .* 96"),
        ({"num_sparse": 0}, "num_sparse=0"),
        ({"num_sparse": 10**9}, "num_sparse=1000000000"),
        ({"rounds": 0}, "rounds=0"),
        ({"iterations": 0}, "iterations=0"),
    ],
)
def test_bad_input_is_told(arguments, message):
    with pytest.raises(ValueError, match=message):
        decompose(torch.ones(1, 96, 128), **{"rank": 4, "num_sparse": 8} | arguments)
    with pytest.raises(ValueError, match="Stack them"):
        decompose(torch.ones(96, 128), rank=4, num_sparse=8)
