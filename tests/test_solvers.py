"""Solvers of one matrix: Gram matrices, SparseGPT against a plain loop over columns, and bad input."""

import pytest
import torch
from helpers.problems import PATTERNS, assert_pattern, gram_of, problem, wanda_mask

from peft_prune.selection.topk import largest_in_rows
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
    sparsegpt,
)
from peft_prune.solvers.pattern import choose


# ------------------------------------------------------------ gram


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


# ------------------------------------------------------------ pattern


def test_largest_in_rows_equals_a_sort_also_with_ties():
    scores = torch.randint(0, 4, (30, 17), generator=torch.Generator().manual_seed(0)).float()
    for k in (1, 5, 16, 17):
        mask = largest_in_rows(scores, k)
        assert (mask.sum(1) == k).all()
        kept = scores.masked_fill(~mask, -1).sort(1, descending=True).values[:, :k]
        assert torch.equal(kept, scores.sort(1, descending=True).values[:, :k])


# ------------------------------------------------------------ sparsegpt


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


# ------------------------------------------------------------ bad input


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
        (lambda: outlier_ratio([W * float("nan")]), "importance holds NaN"),
        (lambda: add_inputs(torch.zeros(3, 3), W), "torch.zeros"),
        (lambda: loss(W, W[:2], G), "values has shape"),
    ],
)
def test_errors_name_argument_value_and_fix(call, message):
    with pytest.raises(ValueError, match=message):
        call()
