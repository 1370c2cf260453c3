"""Similarity, clustering and budget of P-pruning against computations by definition."""

import itertools
from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy.cluster.hierarchy import fcluster, linkage
from scipy.spatial.distance import squareform

from peft_prune.structure.budget import Plan, choose_units
from peft_prune.structure.clustering import column_similarity, head_similarity, least_first, removal_order
from peft_prune.structure.shapes import Shapes
from peft_prune.structure.sites import HEADS, NEURONS, Site


def activations(columns, tokens=50, seed=0):
    generator = torch.Generator().manual_seed(seed)
    factors = torch.randn(tokens, 5, generator=generator) @ torch.randn(5, columns, generator=generator)
    return factors + 0.3 * torch.randn(tokens, columns, generator=generator)


def cosine(a, b):
    return abs(float(a.double() @ b.double() / (a.double().norm() * b.double().norm())))


def test_neurons_pair_by_pair():
    matrix = activations(17)
    found = column_similarity(matrix)
    for i, j in itertools.product(range(17), repeat=2):
        assert found[i, j] == pytest.approx(cosine(matrix[:, i], matrix[:, j]), abs=1e-6)


def test_silent_neurons_are_like_each_other_only():
    matrix = activations(5)
    matrix[:, [1, 3]] = 0
    found = column_similarity(matrix)
    assert found[1, 3] == found[3, 1] == 1 and found[1, 0] == found[2, 3] == 0 and bool((found.diagonal() == 1).all())


@pytest.mark.parametrize("matching", ["greedy", "assignment"])
def test_heads_pair_by_pair(matching):
    width, heads = 4, 5
    matrix = activations(width * heads)
    found = head_similarity(matrix, width, matching)
    assert torch.equal(found, found.T) and bool((found.diagonal() == 1).all())
    for a, b in itertools.combinations(range(heads), 2):
        values = np.array(
            [[cosine(matrix[:, a * width + i], matrix[:, b * width + j]) for j in range(width)] for i in range(width)]
        )
        if matching == "assignment":  # of all ways to match the best
            sums = [sum(values[i, p[i]] for i in range(width)) for p in itertools.permutations(range(width))]
            expected = max(sums) / width
        else:
            expected = 0.0
            for _ in range(width):
                i, j = np.unravel_index(values.argmax(), values.shape)
                expected += values[i, j] / width
                values[i, :] = values[:, j] = -1
        assert found[a, b] == pytest.approx(expected, abs=1e-6)


def test_matching_does_not_depend_on_the_order_of_dimensions():
    matrix = activations(8)
    turned = torch.cat([matrix[:, :4], matrix[:, :4][:, [2, 0, 3, 1]]], dim=1)
    for matching in ("greedy", "assignment"):
        assert head_similarity(turned, 4, matching)[0, 1] == pytest.approx(1.0, abs=1e-6)


@pytest.mark.parametrize("method", ["complete", "average", "single"])
@pytest.mark.parametrize("clusters", [1, 3, 7, 11])
def test_of_each_cluster_the_most_important_stays(method, clusters):
    matrix = activations(11, seed=clusters)
    similarity, importance = column_similarity(matrix), matrix.abs().mean(0)
    heights, order = removal_order(similarity, importance, method)
    stays = set(range(11)) - set(order[: 11 - clusters].tolist())
    tree = linkage(squareform(1 - similarity.double().numpy(), checks=False), method)
    labels = fcluster(tree, clusters, "maxclust")
    expected = {max(np.flatnonzero(labels == k), key=lambda i: importance[i]) for k in set(labels)}
    assert stays == expected and bool((np.diff(heights) >= 0).all())


def test_least_important_first():
    heights, order = least_first(torch.tensor([3.0, 1.0, 2.0]))
    assert order.tolist() == [1, 2] and heights.tolist() == [1.0, 2.0]
    assert removal_order(torch.ones(1, 1), torch.ones(1))[1].shape == (0,)


def plan(name, kind, cost, heights):
    units = len(heights) + 1
    site = Site(kind, name, torch.arange(units).view(-1, 1), {}, name, name, name)
    return Plan(site, cost, np.array(heights), np.arange(len(heights)))


def test_one_height_for_all_layers_of_a_kind():
    plans = [
        plan("a", HEADS, 10, [0.1, 0.2, 0.9]),
        plan("b", HEADS, 10, [0.5, 0.6, 0.7]),
        plan("c", NEURONS, 1, [0.1] * 40 + [0.9] * 19),
    ]
    # 140 in all; 60 have to go, 1 : 1
    kept = choose_units(plans, 80 / 140, 1.0)
    assert kept["a"].tolist() == [2, 3] and kept["b"].tolist() == [1, 2, 3]  # heights 0.1, 0.2, 0.5
    assert len(kept["c"]) == 30


@pytest.mark.parametrize("keep", [0.9, 0.5, 0.3, 0.1])
@pytest.mark.parametrize("ratio", [0.0, 1.0, 5.0, 1e6])
def test_the_budget_is_met_and_not_by_far(keep, ratio):
    generator = np.random.default_rng(0)
    plans = [plan(f"h{i}", HEADS, 32, np.sort(generator.random(11))) for i in range(4)]
    plans += [plan(f"n{i}", NEURONS, 3, np.sort(generator.random(99))) for i in range(4)]
    total = sum(p.cost * p.site.units for p in plans)
    kept = choose_units(plans, keep, ratio)
    left = sum(p.cost * len(kept[p.site.output]) for p in plans)
    assert keep * total - 35 <= left <= keep * total + 1
    assert min(len(units) for units in kept.values()) >= 1


@pytest.mark.parametrize("keep", [0.9, 0.6, 0.3])
@pytest.mark.parametrize("ratio", [None, 5.0])
def test_neurons_in_multiples(keep, ratio):
    generator = np.random.default_rng(0)
    plans = [plan(f"h{i}", HEADS, 32, np.sort(generator.random(11))) for i in range(4)]
    plans += [plan(f"n{i}", NEURONS, 3, (i + 1) * np.sort(generator.random(99))) for i in range(4)]
    total = sum(p.cost * p.site.units for p in plans)
    kept = choose_units(plans, keep, ratio, shapes=Shapes("free", 16))
    counts = [len(kept[p.site.output]) for p in plans if p.site.kind == NEURONS]
    assert all(count % 16 == 0 or count == 100 for count in counts)
    assert keep != 0.6 or len(set(counts)) > 1
    left = sum(p.cost * len(kept[p.site.output]) for p in plans)
    assert keep * total - 16 * 3 <= left <= keep * total + 1


@pytest.mark.parametrize("keep", [0.9, 0.6, 0.3])
@pytest.mark.parametrize("multiple", [1, 16])
def test_the_same_number_in_every_layer(keep, multiple):
    generator = np.random.default_rng(0)
    heads = [plan(f"h{i}", HEADS, 32, np.sort(generator.random(11))) for i in range(4)]
    neurons = [plan(f"n{i}", NEURONS, 3, np.sort(generator.random(111))) for i in range(4)]
    total = sum(p.cost * p.site.units for p in heads + neurons)
    free = choose_units(heads + neurons, keep, None, shapes=Shapes("free", multiple))
    mean = sum(12 - len(free[p.site.output]) for p in heads) / 4
    kept = choose_units(heads + neurons, keep, None, shapes=Shapes("uniform", multiple))
    (stay,), (left,) = ({len(kept[p.site.output]) for p in part} for part in (heads, neurons))
    assert abs((12 - stay) - mean) < 1 and left % multiple == 0
    assert 4 * (32 * stay + 3 * left) <= keep * total < 4 * (32 * stay + 3 * (left + multiple))
    # of the two numbers of heads beside the mean, the one that loses less
    lost = {}
    for gone in (int(mean), int(mean) + 1):
        rest = int((keep * total / 4 - 32 * (12 - gone)) / 3) // multiple * multiple
        if 1 <= rest <= 112:
            lost[gone] = sum(32 * p.heights[:gone].sum() for p in heads) + sum(
                3 * p.heights[: 112 - rest].sum() for p in neurons
            )
    assert min(lost, key=lost.get) == 12 - stay
    for p in heads + neurons:  # the first of its order go
        assert kept[p.site.output].tolist() == list(range(p.site.units - len(kept[p.site.output]), p.site.units))


def test_a_budget_out_of_reach_is_told():
    with pytest.raises(ValueError, match=r"keep_ratio=0.1 cannot be reached.*0\.2500 of the FLOPs"):
        choose_units([plan("a", HEADS, 10, [0.1, 0.2, 0.9])], 0.1, 5.0)
    with pytest.raises(ValueError, match="shapes='uniform'.*shapes='free'"):
        one = plan("a", NEURONS, 1, [0.1] * 19)
        other = replace(plan("b", NEURONS, 1, [0.1] * 19), heights=np.array([0.1]), order=np.array([0]))
        choose_units([one, other], 0.6, None, shapes=Shapes("uniform"))
