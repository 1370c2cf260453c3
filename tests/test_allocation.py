"""How a density is shared out."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from peft_prune.selection.allocation import allocate_by_score, allocate_globally, share_by_weight


def share(sizes, weights, density):
    weights = torch.tensor([weights], dtype=torch.float64)
    return share_by_weight(torch.tensor([sizes]), weights, density)[0].tolist()


@settings(max_examples=200, deadline=None)
@given(
    sizes=st.lists(st.integers(1, 500), min_size=1, max_size=8),
    density=st.floats(0, 1),
    data=st.data(),
)
def test_shares_are_exact_bounded_and_in_proportion(sizes, density, data):
    weights = [data.draw(st.floats(0, 10)) for _ in sizes]
    counts = share(sizes, weights, density)
    assert sum(counts) == round(density * sum(sizes))
    assert all(0 <= count <= size for count, size in zip(counts, sizes, strict=True))
    free = [i for i in range(len(sizes)) if 0 < counts[i] < sizes[i] and weights[i] > 1e-3]
    for i in free:
        for j in free:
            # rounding moves a count by less than one place
            assert abs(counts[i] / (sizes[i] * weights[i]) - counts[j] / (sizes[j] * weights[j])) <= (
                1 / (sizes[i] * weights[i]) + 1 / (sizes[j] * weights[j])
            )


def test_excess_of_a_full_matrix_goes_to_the_others():
    assert share([100, 100, 100], [10, 1, 1], 0.5) == [100, 25, 25]


@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_score_allocation_is_the_papers_formula(temperature):
    torch.manual_seed(0)
    scores = [torch.randn(20, 30) + shift for shift in (-0.5, 0.0, 0.3)] + [torch.randn(10, 10) for _ in range(2)]
    kinds = ["query"] * 3 + ["output"] * 2
    density = 0.2
    counts = allocate_by_score(scores, kinds, density, temperature).tolist()
    means = [torch.sigmoid(s / temperature).mean().item() for s in scores]
    for members in ([0, 1, 2], [3, 4]):
        total = sum(means[i] for i in members)
        for i in members:
            expected = density * len(members) * means[i] / total * scores[i].numel()
            assert abs(counts[i] - expected) <= 1
        assert sum(counts[i] for i in members) == round(density * sum(scores[i].numel() for i in members))


def test_global_allocation_is_one_threshold():
    torch.manual_seed(0)
    scores = [torch.randn(11, 7) * scale for scale in (0.5, 1.0, 2.0)]
    everything = torch.cat([s.reshape(-1) for s in scores])
    threshold = everything.sort(descending=True).values[round(0.3 * everything.numel()) - 1]
    assert allocate_globally(scores, 0.3).tolist() == [int((s >= threshold).sum()) for s in scores]
