"""Solvers of one matrix against lstsq, brute force, SVD and the papers' equations."""

import itertools

import pytest
import torch
from helpers.problems import PATTERNS, assert_pattern, gram_of, problem, wanda_mask

from peft_prune.selection.topk import largest_in_rows
from peft_prune.solvers import (
    admm,
    improve_mask,
    loss,
    low_rank_error,
    outlier_ratio,
    owl_sparsities,
    refit,
    refit_exactly,
    sparsegpt,
)


# ------------------------------------------------------------ least squares


@pytest.mark.parametrize("damping", [0.0, 0.01])
def test_exact_refit_is_least_squares_over_the_kept_inputs(damping):
    weight, x = problem(6, 24, dtype=torch.float64)
    gram = gram_of(x)
    mask = torch.rand(weight.shape, generator=torch.Generator().manual_seed(1)) > 0.5
    ridge = (damping * gram.diagonal().mean()).sqrt()
    stacked = torch.cat([x, ridge * torch.eye(24).double()])
    values = refit_exactly(weight, mask, gram, damping)
    for row in range(6):
        kept = mask[row]
        best = torch.linalg.lstsq(stacked[:, kept], stacked @ weight[row][:, None]).solution[:, 0]
        torch.testing.assert_close(values[row, kept], best)
    assert (values[~mask] == 0).all()


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-3), (torch.float64, 1e-8)])
def test_refit_converges_to_the_exact_values(pattern, dtype, tolerance):
    weight, x = problem()
    gram = gram_of(x, dtype)
    mask = wanda_mask(weight, gram, pattern)
    values, exact = refit(weight, mask, gram, 0.01, steps=100), refit_exactly(weight, mask, gram.double(), 0.01)
    assert values.dtype == dtype
    assert (values - exact).norm() / exact.norm() < tolerance
    from_zero = refit(weight, mask, gram, 0.01, steps=100, start=torch.zeros_like(weight))
    assert (from_zero - exact).norm() / exact.norm() < tolerance


@pytest.mark.parametrize("steps", [0, 1, 3, 10, 60, 300])
@pytest.mark.parametrize("damping", [0.0, 0.01, 1.0])
def test_refit_never_raises_the_loss_of_a_row(steps, damping):
    weight, x = problem()
    gram = gram_of(x, torch.float32)
    mask, start = sparsegpt(weight, gram, 0.6)
    for begin in (start, weight * mask):
        values = refit(weight, mask, gram, damping, steps, begin)
        for row in range(len(weight)):
            before, after = (loss(weight[row, None], v[row, None], gram) for v in (begin, values))
            assert after <= before * (1 + 1e-5) + 1e-9
        assert (values[~mask] == 0).all()


def test_refit_of_rows_that_keep_all_or_nothing():
    weight, x = problem(3, 16)
    mask = torch.ones(3, 16, dtype=torch.bool)
    mask[1] = False
    values = refit(weight, mask, gram_of(x, torch.float32))
    torch.testing.assert_close(values, weight * mask)


# ------------------------------------------------------------ admm


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("seed", range(4))
def test_admm_beats_sparsegpt_with_the_same_pattern(pattern, seed):
    weight, x = problem(seed=seed)
    gram = gram_of(x, torch.float32)
    mask, values = admm(weight, gram, pattern)
    assert_pattern(mask, pattern)
    assert (values[~mask] == 0).all() and torch.isfinite(values).all()
    assert loss(weight, values, gram) < loss(weight, sparsegpt(weight, gram, pattern)[1], gram)


def test_one_round_of_admm_is_wanda():
    weight, x = problem()
    gram = gram_of(x)
    mask, values = admm(weight, gram, 0.5, rounds=1, ramp=1, steps=0)
    assert torch.equal(mask, wanda_mask(weight.double(), gram, 0.5))
    torch.testing.assert_close(values, weight.double() * mask)


def test_admm_equals_its_equations():
    weight, x = problem(8, 16, dtype=torch.float64)
    gram = gram_of(x)
    scale = gram.diagonal().sqrt()
    h = gram / scale / scale[:, None] + 0.02 * torch.eye(16).double()
    w0, u, w = weight * scale, torch.zeros_like(weight), weight * scale
    for number in range(1, 7):
        sparsity = 0.5 * (1 - (1 - min(number, 4) / 4) ** 3)
        if number <= 4:
            mask = largest_in_rows((w + u).abs(), round((1 - sparsity) * 16))
        z = (w + u) * mask
        u = u + w - z
        w = torch.linalg.solve(h + 0.7 * torch.eye(16).double(), (w0 @ h + 0.7 * (z - u)).T).T
    found, values = admm(weight, gram, 0.5, damping=0.02, rho=0.7, rounds=6, ramp=4, steps=0)
    assert torch.equal(found, mask)
    torch.testing.assert_close(values, z / scale)


def test_admm_is_close_to_the_best_of_all_masks():
    weight, x = problem(4, 8, dtype=torch.float64)
    gram = gram_of(x)
    values = admm(weight, gram, 0.5, damping=1e-6, steps=50)[1]
    for row in range(4):
        own = weight[row, None]
        masks = [torch.zeros(1, 8, dtype=torch.bool) for _ in itertools.combinations(range(8), 4)]
        for mask, places in zip(masks, itertools.combinations(range(8), 4), strict=True):
            mask[0, list(places)] = True
        all_losses = sorted(loss(own, refit_exactly(own, mask, gram, 0.0), gram) for mask in masks)
        assert loss(own, values[row, None], gram) <= all_losses[len(all_losses) // 7] * (1 + 1e-6)


# ------------------------------------------------------------ swaps


def swaps_of(mask, groups):
    for p, q in itertools.product(mask.nonzero().flatten().tolist(), (~mask).nonzero().flatten().tolist()):
        if groups is None or p // groups[1] == q // groups[1]:
            yield p, q


@pytest.mark.parametrize("groups", [None, (2, 4), (3, 8)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_no_single_swap_improves_what_comes_out(groups, dtype):
    weight, x = problem(12, 16)
    gram = gram_of(x, dtype)
    start = wanda_mask(weight, gram, groups or 0.5)
    better = improve_mask(weight, start, gram, 200, groups, candidates=16)
    assert_pattern(better, groups or 0.5)
    assert not torch.equal(better, start)
    for row in range(12):
        own = weight[row, None]
        now = loss(own, own * better[row], gram)
        assert now <= loss(own, own * start[row], gram)
        for p, q in swaps_of(better[row], groups):
            other = better[row].clone()
            other[p], other[q] = False, True
            assert loss(own, own * other, gram) >= now * (1 - 1e-5)


@pytest.mark.parametrize("groups", [None, (2, 4)])
def test_swaps_keep_what_each_row_keeps_where_that_differs(groups):
    weight, x = problem(24, 32)
    gram = gram_of(x, torch.float32)
    start = torch.rand(24, 32, generator=torch.Generator().manual_seed(0)) < torch.arange(24)[:, None] / 23
    start[0], start[1] = False, True
    better = improve_mask(weight, start, gram, 300, groups, candidates=32)
    assert torch.equal(better.sum(1), start.sum(1)) and not torch.equal(better, start)
    assert torch.equal(better[:2], start[:2])


@pytest.mark.parametrize("groups", [None, (2, 4)])
@pytest.mark.parametrize("candidates", [1, 3, 8, 1000])
def test_swaps_with_few_candidates(groups, candidates):
    weight, x = problem()
    gram = gram_of(x, torch.float32)
    start = wanda_mask(weight, gram, groups or 0.6)
    losses = [loss(weight, weight * start, gram)]
    for steps in (1, 2, 5, 300):
        better = improve_mask(weight, start, gram, steps, groups, candidates)
        assert_pattern(better, groups or 0.6)
        losses.append(loss(weight, weight * better, gram))
    assert losses == sorted(losses, reverse=True) and losses[-1] < 0.8 * losses[0]
    assert torch.equal(improve_mask(weight, better, gram, 300, groups, candidates), better)
    assert torch.equal(improve_mask(weight, start, gram, 0, groups, candidates), start)


def test_a_step_of_swaps_follows_the_loss_exactly():
    """One row, two steps by hand: the best of all pairs, each time found by brute force."""
    weight, x = problem(1, 10, dtype=torch.float64)
    gram = gram_of(x)
    mask = start = wanda_mask(weight, gram, 0.5)
    while True:
        found = []
        for p, q in swaps_of(mask[0], None):
            other = mask.clone()
            other[0, p], other[0, q] = False, True
            found.append((loss(weight, weight * other, gram), other))
        best, other = min(found, key=lambda entry: entry[0])
        if best >= loss(weight, weight * mask, gram):
            break
        mask = other
    better = improve_mask(weight, start, gram, candidates=10)
    assert loss(weight, weight * better, gram) <= loss(weight, weight * start, gram)
    # a weight moves once a step, so the ways may part; both end where no swap gains
    assert loss(weight, weight * better, gram) == pytest.approx(loss(weight, weight * mask, gram), rel=0.2)


# ------------------------------------------------------------ low rank


@pytest.mark.parametrize("shape", [(20, 32), (32, 20)])
def test_low_rank_is_the_best_in_the_weighted_norm(shape):
    weight, x = problem(*shape, dtype=torch.float64)
    gram = gram_of(x)
    squares, values = gram.diagonal().contiguous(), weight * wanda_mask(weight, gram, 0.5)
    a, b = low_rank_error(weight, values, squares, rank=3)
    assert a.shape == (3, shape[1]) and b.shape == (shape[0], 3) and a.dtype == b.dtype == torch.float32
    error = (weight - values) * squares.sqrt()
    left = torch.linalg.svdvals(error)[3:].square().sum()
    found = (error - b.double() @ a.double() * squares.sqrt()).square().sum()
    assert float(found) == pytest.approx(float(left), rel=1e-6)
    for seed in range(5):
        random = torch.randn(shape[0], 3, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        fitted = random @ torch.linalg.lstsq(random, error).solution
        assert found < (error - fitted).square().sum()


@pytest.mark.parametrize("shape", [(20, 32), (32, 20)])
def test_low_rank_with_the_gram_matrix_is_the_best_for_the_outputs(shape):
    weight, x = problem(*shape, dtype=torch.float64)
    gram = gram_of(x)
    values = weight * wanda_mask(weight, gram, 0.5)
    a, b = low_rank_error(weight, values, gram, rank=3)
    outputs = x @ (weight - values).T
    found = (outputs - x @ (b.double() @ a.double()).T).square().sum()
    assert float(found) == pytest.approx(float(torch.linalg.svdvals(outputs)[3:].square().sum()), rel=1e-5)
    by_size = low_rank_error(weight, values, gram.diagonal().contiguous(), rank=3)
    assert loss(weight, values + b @ a, gram) < loss(weight, values + by_size[1] @ by_size[0], gram)


def test_low_rank_of_full_rank_undoes_everything_but_dead_inputs():
    weight, x = problem(6, 9)
    x[:, 4] = 0
    values = weight * (weight > 0)
    a, b = low_rank_error(weight, values, gram_of(x).diagonal().contiguous(), rank=6)
    live = torch.arange(9) != 4
    torch.testing.assert_close((values + b @ a)[:, live], weight[:, live], rtol=1e-4, atol=1e-5)
    assert (a[:, 4] == 0).all() and torch.isfinite(b).all()
    a, b = low_rank_error(weight, weight, gram_of(x), rank=2, damping=0.01)  # nothing to make up for
    assert torch.isfinite(a).all() and (b @ a).abs().max() < 1e-6


# ------------------------------------------------------------ outliers


def test_outlier_ratio():
    importance = torch.tensor([1.0] * 99 + [1000.0])  # mean 10.99
    assert outlier_ratio([importance]) == 0.01 == outlier_ratio([importance[:50], importance[50:]], 7)
    assert outlier_ratio([torch.ones(10)]) == 0


@pytest.mark.parametrize("sizes", [None, [10, 1000, 70, 300]])
@pytest.mark.parametrize("sparsity", [0.0, 0.03, 0.5, 0.7, 0.99])
def test_owl_has_the_mean_that_was_asked_for(sizes, sparsity):
    ratios = [0.01, 0.05, 0.02, 0.011]
    found = torch.tensor(owl_sparsities(ratios, sparsity, sizes=sizes), dtype=torch.float64)
    weights = torch.tensor(sizes or [1] * 4, dtype=torch.float64)
    assert float((found * weights).sum() / weights.sum()) == pytest.approx(sparsity, abs=1e-12)
    assert (found >= 0).all() and (found < 1).all()
    order = torch.tensor(ratios).argsort()
    assert (found[order].diff() <= 0).all()


def test_owl_equals_the_reference():
    ratios = torch.tensor([0.01, 0.05, 0.02, 0.011], dtype=torch.float64)
    stretched = (ratios - ratios.min()) * (1 / (ratios.max() - ratios.min()) * 0.08 * 2)
    kept = stretched - stretched.mean() + (1 - 0.7)
    assert owl_sparsities(ratios.tolist(), 0.7, 0.08) == pytest.approx((1 - kept).tolist())
    assert owl_sparsities([0.3, 0.3], 0.6) == pytest.approx([0.6, 0.6])
    assert owl_sparsities([0.3, 0.1], 0.6, spread=0.0) == pytest.approx([0.6, 0.6])
