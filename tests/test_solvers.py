"""Solvers of one matrix against independent computations: brute force, lstsq, SVD, a plain loop over columns."""

import itertools

import pytest
import torch

from peft_prune.solvers import (
    add_inputs,
    admm,
    damped,
    improve_mask,
    loss,
    low_rank_error,
    outlier_ratio,
    owl_sparsities,
    refit,
    refit_exactly,
    sparsegpt,
)
from peft_prune.solvers.pattern import choose, largest_in_rows


PATTERNS = [0.5, 0.7, (2, 4), (4, 8)]


def problem(rows=48, columns=64, tokens=256, seed=0, dtype=torch.float32):
    """A weight, and inputs that depend on each other and differ in size: (rows, columns), (tokens, columns)."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(columns, columns, generator=generator) / columns**0.5
    sizes = torch.randn(columns, generator=generator).exp()
    falling = torch.arange(1, columns + 1) ** -0.7
    x = (torch.randn(tokens, columns, generator=generator) * falling) @ mix * sizes
    return torch.randn(rows, columns, generator=generator).to(dtype), x.to(dtype)


def gram_of(x, dtype=torch.float64):
    return add_inputs(torch.zeros(x.shape[-1], x.shape[-1], dtype=dtype), x)


def wanda_mask(weight, gram, pattern):
    return choose(weight.abs() * gram.diagonal().to(weight).sqrt(), pattern)


def assert_pattern(mask, pattern):
    if isinstance(pattern, tuple):
        assert (mask.view(-1, pattern[1]).sum(1) == pattern[0]).all()
    else:
        assert (mask.sum(1) == round((1 - pattern) * mask.shape[1])).all()


# ------------------------------------------------------------------- gram


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("columns", [5, 600])
def test_gram_of_batches_equals_one_product(dtype, columns):
    x = torch.randn(3, 40, columns, generator=torch.Generator().manual_seed(0))
    gram = torch.zeros(columns, columns, dtype=dtype)
    for batch in x.to(torch.bfloat16):
        assert add_inputs(gram, batch) is gram
    flat = x.to(torch.bfloat16).double().flatten(0, 1)
    torch.testing.assert_close(gram.double(), flat.T @ flat, rtol=1e-5, atol=1e-4)
    assert torch.equal(gram, gram.T) or (gram - gram.T).abs().max() < 1e-4


def test_damping_adds_a_share_of_the_mean_and_gives_dead_inputs_a_diagonal():
    gram = gram_of(problem()[1])
    torch.testing.assert_close(damped(gram, 0.3), gram + 0.3 * gram.diagonal().mean() * torch.eye(64).double())
    gram[5], gram[:, 5] = 0, 0
    diagonal = damped(gram, 0.0).diagonal()
    assert 0 < diagonal[5] < 1e-5 * diagonal.mean()
    assert torch.equal(damped(gram, 0.5).diagonal()[5], diagonal[5])
    assert (damped(torch.zeros(3, 3), 0.0).diagonal() > 0).all()


def test_loss_is_that_of_the_outputs():
    weight, x = problem(dtype=torch.float64)
    values = weight * (torch.rand(weight.shape) > 0.5)
    expected = (x @ (values - weight).T).square().sum() / (x @ weight.T).square().sum()
    assert loss(weight, values, gram_of(x)) == pytest.approx(float(expected))
    assert loss(weight, weight, gram_of(x)) == 0.0
    assert loss(weight, torch.zeros_like(weight), gram_of(x)) == pytest.approx(1.0)


# ---------------------------------------------------------------- pattern


def test_largest_in_rows_equals_a_sort_also_with_ties():
    scores = torch.randint(0, 4, (30, 17), generator=torch.Generator().manual_seed(0)).float()
    for k in (1, 5, 16, 17):
        mask = largest_in_rows(scores, k)
        assert (mask.sum(1) == k).all()
        kept = scores.masked_fill(~mask, -1).sort(1, descending=True).values[:, :k]
        assert torch.equal(kept, scores.sort(1, descending=True).values[:, :k])


# -------------------------------------------------------------- sparsegpt


def plain_sparsegpt(weight, gram, pattern, damping, block):
    """The paper's algorithm without blocks of updates: every error is spread over all columns to the right at once."""
    inverse = torch.linalg.inv(damped(gram, damping))
    upper = torch.linalg.cholesky(inverse, upper=True)
    w, mask = weight.clone().to(gram), torch.zeros(weight.shape, dtype=torch.bool)
    kept_before = 0
    for j in range(w.shape[1]):
        if isinstance(pattern, tuple) and j % pattern[1] == 0:
            group = slice(j, j + pattern[1])
            order = (w[:, group] / upper.diagonal()[group]).abs().argsort(1, descending=True)
            mask[:, group] = mask[:, group].scatter(1, order[:, : pattern[0]], True)
        if not isinstance(pattern, tuple) and j % block == 0:
            own = slice(j, min(j + block, w.shape[1]))
            score = (w[:, own] / upper.diagonal()[own]).abs()
            removed = round(pattern * own.stop * len(w))
            places = score.flatten().argsort(descending=True)[: own.stop * len(w) - removed - kept_before]
            mask[:, own] = torch.zeros(score.numel(), dtype=torch.bool).scatter(0, places, True).view(score.shape)
            kept_before = own.stop * len(w) - removed
        error = w[:, j] * ~mask[:, j] / upper[j, j]
        w[:, j:] -= error[:, None] * upper[j, j:]
        w[:, j] *= mask[:, j]
    return mask, w


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("block", [16, 64, 128])
def test_sparsegpt_equals_the_plain_loop(pattern, block):
    weight, x = problem(33, 56, dtype=torch.float64)
    gram = gram_of(x)
    mask, values = sparsegpt(weight, gram, pattern, damping=0.02, block=block)
    expected_mask, expected = plain_sparsegpt(weight, gram, pattern, 0.02, block)
    assert torch.equal(mask, expected_mask)
    torch.testing.assert_close(values, expected, rtol=1e-8, atol=1e-10)


def test_obs_of_one_weight():
    """What one removed weight does to the others is Optimal Brain Surgeon's step on those to its right."""
    weight, x = problem(1, 8, dtype=torch.float64)
    gram = gram_of(x)
    mask, values = sparsegpt(weight, gram, 1 / 8, damping=0.0)
    (place,) = (~mask[0]).nonzero().flatten().tolist()
    right = list(range(place + 1, 8))
    best = torch.linalg.lstsq(x[:, right], (x[:, place] * weight[0, place])[:, None]).solution[:, 0]
    torch.testing.assert_close(values[0, right] - weight[0, right], best)
    torch.testing.assert_close(values[0, :place], weight[0, :place])


@pytest.mark.parametrize("sparsity", [0.0, 0.33, 0.5, 0.9])
def test_sparsity_of_sparsegpt_is_exact_in_each_block_and_in_all(sparsity):
    weight, x = problem(31, 50)
    mask, values = sparsegpt(weight, gram_of(x), sparsity, block=16)
    assert abs(int(mask.sum()) - (1 - sparsity) * mask.numel()) <= 0.5
    for block in mask.split(16, dim=1):
        assert abs(int(block.sum()) - (1 - sparsity) * block.numel()) <= 1
    assert (values[~mask] == 0).all()
    if sparsity == 0:
        torch.testing.assert_close(values.float(), weight)


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("seed", range(3))
def test_sparsegpt_beats_wanda_which_beats_magnitude(pattern, seed):
    weight, x = problem(seed=seed)
    gram = gram_of(x, torch.float32)
    mask, values = sparsegpt(weight, gram, pattern)
    magnitude, wanda = choose(weight.abs(), pattern), wanda_mask(weight, gram, pattern)
    losses = [loss(weight, found, gram) for found in (values, weight * wanda, weight * magnitude)]
    assert losses[0] < losses[1] < losses[2]
    if isinstance(pattern, tuple):
        assert_pattern(mask, pattern)


@pytest.mark.parametrize("solve", [sparsegpt, admm])
@pytest.mark.parametrize("pattern", PATTERNS)
def test_float32_agrees_with_float64(solve, pattern):
    weight, x = problem()
    gram = gram_of(x)
    single, double = solve(weight, gram.float(), pattern), solve(weight, gram, pattern)
    assert single[1].dtype == torch.float32 and double[1].dtype == torch.float64
    assert (single[0] == double[0]).float().mean() > 0.99
    assert loss(weight, single[1], gram) == pytest.approx(loss(weight, double[1], gram), rel=1e-2)


# ---------------------------------------------------------- least squares


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


# ------------------------------------------------------------------- admm


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


# ------------------------------------------------------------------ swaps


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


# --------------------------------------------------------------- low rank


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


# --------------------------------------------------------------- outliers


def test_outlier_ratio():
    importance = torch.tensor([1.0] * 99 + [1000.0])  # mean 10.99
    assert outlier_ratio(importance) == 0.01 == outlier_ratio(importance, 7)
    assert outlier_ratio(torch.ones(10)) == 0


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


# -------------------------------------------------------------- bad input


@pytest.mark.parametrize("solve", [sparsegpt, admm])
def test_dead_inputs_lose_their_weights_first(solve):
    weight, x = problem()
    x[:, [3, 60]] = 0
    mask, values = solve(weight, gram_of(x, torch.float32), 0.5)
    assert not mask[:, [3, 60]].any() and torch.isfinite(values).all()
    mask, values = solve(weight, torch.zeros(64, 64), 0.5)  # nothing is known
    assert torch.isfinite(values).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_weights(dtype):
    weight, x = problem(dtype=dtype)
    gram = gram_of(x, torch.float32)
    for mask, values in (sparsegpt(weight, gram, 0.5), admm(weight, gram, (2, 4))):
        assert values.dtype == torch.float32 and torch.isfinite(values).all()
        assert improve_mask(weight, mask, gram).dtype == torch.bool


W, G, M = torch.ones(4, 8), torch.eye(8), torch.ones(4, 8, dtype=torch.bool)


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: sparsegpt(W, torch.eye(4), 0.5), "gram has shape"),
        (lambda: sparsegpt(W, G.half(), 0.5), "gram must be float32"),
        (lambda: sparsegpt(W * float("nan"), G, 0.5), "weight holds NaN"),
        (lambda: sparsegpt(W, G * float("inf"), 0.5), "gram holds NaN"),
        (lambda: sparsegpt(W[0], G, 0.5), "float matrix"),
        (lambda: sparsegpt(W, G, 1.0), "pattern=1.0"),
        (lambda: sparsegpt(W, G, "2:4"), "pattern='2:4'"),
        (lambda: sparsegpt(W, G, (4, 2)), "1 ≤ n < m"),
        (lambda: sparsegpt(W, G, (2, 3)), "divisible by 3"),
        (lambda: sparsegpt(W, G, (2, 4), block=10), "block=10"),
        (lambda: sparsegpt(W, G, 0.5, damping=-1), "damping=-1"),
        (lambda: sparsegpt(W, torch.ones(8, 8) - 2 * G, 0.5, damping=0), "larger damping"),
        (lambda: admm(W, G, 0.5, rho=0), "rho=0"),
        (lambda: admm(W, G, 0.5, rounds=3), "rounds=3"),
        (lambda: admm(W, G, 0.5, ramp=0), "ramp=0"),
        (lambda: refit(W, M.float(), G), "mask must be bool"),
        (lambda: refit(W, M[:2], G), "mask must be bool of shape"),
        (lambda: refit(W, M, G, steps=-1), "steps=-1"),
        (lambda: improve_mask(W, M, G, groups=(2, 5)), "divisible by 5"),
        (lambda: improve_mask(W, M, G, candidates=0), "candidates=0"),
        (lambda: low_rank_error(W, W, G.diagonal()[:4], 2), "inputs has shape"),
        (lambda: low_rank_error(W, W, -G.diagonal(), 2), "negative squares"),
        (lambda: low_rank_error(W, W, G, 5), "rank=5"),
        (lambda: low_rank_error(W, W, G, 0), "rank=0"),
        (lambda: owl_sparsities([], 0.5), "ratios="),
        (lambda: owl_sparsities([float("nan")], 0.5), "ratios="),
        (lambda: owl_sparsities([0.1], 1.0), "sparsity=1.0"),
        (lambda: owl_sparsities([0.1], 0.5, spread=-1), "spread=-1"),
        (lambda: owl_sparsities([0.1], 0.5, sizes=[1, 2]), "sizes="),
        (lambda: outlier_ratio(W * float("nan")), "importance holds NaN"),
        (lambda: add_inputs(torch.zeros(3, 3), W), "torch.zeros"),
        (lambda: loss(W, W[:2], G), "values has shape"),
    ],
)
def test_errors_name_argument_value_and_fix(call, message):
    with pytest.raises(ValueError, match=message):
        call()
