"""Top-k against brute force: exactly k, the largest, the same ones every time."""

import pytest
import torch
from helpers.masks import brute_force
from hypothesis import given, settings
from hypothesis import strategies as st

from peft_prune.selection.granularity import NMGranularity, parse_granularity
from peft_prune.selection.rows import count_in_row, kth_largest, row_topk_mask, settle_ties
from peft_prune.selection.topk import n_m_mask, topk_mask
from peft_prune.selection.warm_start import LastThreshold


@settings(max_examples=150, deadline=None)
@given(
    values=st.lists(st.integers(-3, 3), min_size=1, max_size=60),
    share=st.floats(0, 1),
    scale=st.sampled_from([1.0, 1e-30, 1e30]),
)
def test_topk_equals_a_sort_also_with_ties(values, share, scale):
    scores = torch.tensor(values, dtype=torch.float32) * scale
    k = round(share * len(values))
    assert torch.equal(topk_mask(scores, k), brute_force(scores, k))


MOVES = st.lists(st.lists(st.integers(-3, 3), min_size=30, max_size=30), min_size=2, max_size=6)


@settings(max_examples=60, deadline=None)
@given(moves=MOVES, k=st.integers(1, 29))
def test_topk_of_scores_that_move_equals_a_sort_also_with_ties(moves, k):
    scores, last = torch.zeros(30), LastThreshold()
    for move in moves:
        scores += torch.tensor(move) / 4
        assert torch.equal(topk_mask(scores, k, last), brute_force(scores, k))


def test_scores_that_move_little_are_selected_by_what_is_near_the_last_threshold(monkeypatch):
    torch.manual_seed(0)
    scores, drift, last, found = torch.randn(384, 384), torch.randn(384, 384), LastThreshold(), []
    select = LastThreshold.select
    monkeypatch.setattr(LastThreshold, "select", lambda *args: found.append(select(*args)) or found[-1])
    for step in range(12):
        scores += 0.01 * drift
        k = 20_000 - 300 * step
        kept = topk_mask(scores, k, last).view(-1).nonzero().squeeze(1)
        assert kept.tolist() == sorted(scores.view(-1).topk(k).indices.tolist())
    # the first two tell how far a threshold moves
    assert [mask is not None for mask in found] == [False, False] + [True] * 10
    scores[3, 4] = float("nan")
    with pytest.raises(ValueError, match="NaN"):
        topk_mask(scores, k - 300, last)


@pytest.mark.parametrize("shape", [(768, 768), (384, 1536), (7, 13)])
@pytest.mark.parametrize("density", [0.5, 0.1, 0.03, 1.0])
def test_exact_count_on_real_shapes(shape, density):
    torch.manual_seed(0)
    n = shape[0] * shape[1]
    for scores in (torch.randn(shape), torch.zeros(shape), torch.randn(shape).bfloat16()):
        mask = topk_mask(scores, round(density * n))
        assert mask.sum() == round(density * n)
        if density < 1:
            assert scores[mask].min() >= scores[~mask].max()
        assert torch.equal(mask, topk_mask(scores.clone(), round(density * n)))


def test_ties_do_not_take_whole_rows_or_columns():
    mask = topk_mask(torch.zeros(384, 384), 384 * 384 // 2)
    for dim in (0, 1):
        share = mask.float().mean(dim)
        assert 0.4 < share.min() and share.max() < 0.6


def test_nan_and_impossible_k_are_told():
    with pytest.raises(ValueError, match="NaN"):
        topk_mask(torch.full((4, 4), float("nan")), 3)
    scores = torch.randn(8, 8)
    scores[2, 3] = float("nan")
    with pytest.raises(ValueError, match="NaN"):
        topk_mask(scores, 10)
    with pytest.raises(ValueError, match="NaN"):
        n_m_mask(scores, 2, 4)
    for zeros in range(4, 9):  # ties do not hide it
        with pytest.raises(ValueError, match="NaN"):
            topk_mask(torch.tensor([float("nan")] + [0.0] * zeros + [-1.0]), 4)
    with pytest.raises(ValueError, match="k=65"):
        topk_mask(torch.randn(8, 8), 65)


@settings(max_examples=150, deadline=None)
@given(
    rows=st.lists(st.lists(st.integers(-3, 3), min_size=17, max_size=17), min_size=1, max_size=6),
    k=st.integers(0, 17),
    scale=st.sampled_from([1.0, -1.0, 1e-40, 1e30]),
)
def test_each_row_keeps_its_largest_also_with_ties(rows, k, scale):
    scores = torch.tensor(rows, dtype=torch.float32) * scale
    mask = row_topk_mask(scores, k)
    assert (mask.sum(1) == k).all()
    for row, kept in zip(scores, mask, strict=True):
        assert sorted(row[kept].tolist()) == sorted(row.topk(k).values.tolist())
    if 0 < k:  # as an accelerator finds it
        threshold = kth_largest(scores, k)
        assert torch.equal(threshold, scores.topk(k, dim=1).values[:, -1])
        assert torch.equal(settle_ties(scores, threshold[:, None], k, torch.arange(len(scores))), mask)


def test_ties_within_rows_do_not_take_whole_columns():
    mask = row_topk_mask(torch.zeros(384, 96), 48)
    assert (mask.sum(1) == 48).all()
    share = mask.float().mean(0)
    assert 0.4 < share.min() and share.max() < 0.6
    assert mask[0, :48].sum() != 48 and (mask[0] != mask[1]).any()


def test_rows_tell_nan_and_impossible_k():
    scores = torch.randn(4, 8)
    with pytest.raises(ValueError, match="k=9"):
        row_topk_mask(scores, 9)
    scores[2, 3] = float("nan")
    with pytest.raises(ValueError, match="NaN"):
        row_topk_mask(scores, 3)
    assert row_topk_mask(torch.randn(3, 4).bfloat16(), 2).sum() == 6
    assert [count_in_row(d, 576) for d in (0.5, 0.1, 1e-9, 1.0)] == [288, 58, 1, 576]


@pytest.mark.parametrize(("n", "m"), [(2, 4), (1, 4), (4, 8), (3, 5)])
def test_n_m_keeps_the_largest_of_each_group(n, m):
    torch.manual_seed(0)
    scores = torch.randint(-2, 3, (6, m * 7)).float()
    mask = n_m_mask(scores, n, m)
    for row, kept in zip(scores.tolist(), mask.tolist(), strict=True):
        for start in range(0, len(row), m):
            group = row[start : start + m]
            best = sorted(range(m), key=lambda i: (-group[i], i))[:n]
            assert [i for i in range(m) if kept[start + i]] == sorted(best)


def test_n_m_density_falls_in_whole_weights_and_ends_exactly():
    pattern = parse_granularity("2:4")
    assert isinstance(pattern, NMGranularity)
    counts = [pattern.count(density, (4, 8)) for density in (1.0, 0.9, 0.75, 0.6, 0.5, 0.4)]
    assert counts == [32, 32, 24, 24, 16, 16]


def test_every_n_m_pattern_is_reached_exactly():
    for m in range(2, 33):
        for n in range(1, m):
            pattern = parse_granularity(f"{n}:{m}")
            sparsity = 1.0 - n / m
            assert pattern.count(1.0 - sparsity, (3, 2 * m)) == 6 * n


@pytest.mark.parametrize("text", ["4:2", "0:4", "2:2", "rows", "2-4", "", None])
def test_unknown_granularity_is_told(text):
    with pytest.raises(ValueError, match="granularity="):
        parse_granularity(text)
