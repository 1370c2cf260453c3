"""Whole units of a matrix: the order of removal, what it costs, and the repair, against brute force and lstsq."""

from itertools import combinations

import pytest
import torch

from peft_prune.solvers import order_without_repair, removal_order, repair, unit_losses


ONES, THREES = torch.arange(12).view(12, 1), torch.arange(12).view(4, 3)


@pytest.fixture
def problem():
    """Weight (5, 12), and inputs (300, 12) that depend on each other."""
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(300, 12, generator=generator, dtype=torch.float64)
    inputs = inputs @ torch.randn(12, 12, generator=generator, dtype=torch.float64) + 0.5
    return torch.randn(5, 12, generator=generator, dtype=torch.float64), inputs


def columns_left(groups, gone):
    kept = torch.ones(12, dtype=torch.bool)
    kept[groups[torch.as_tensor(gone, dtype=torch.int64)].flatten()] = False
    return kept


def refitted(weight, inputs, kept, ridge=0.0):
    """The best weights for some columns, drawn to the old ones, by lstsq."""
    pull = ridge**0.5 * torch.eye(int(kept.sum()), dtype=inputs.dtype)
    left = torch.cat([inputs[:, kept], pull])
    right = torch.cat([inputs @ weight.T, pull @ weight[:, kept].T])
    result = torch.zeros_like(weight)
    result[:, kept] = torch.linalg.lstsq(left, right).solution.T
    return result


def output_loss(weight, inputs, kept):
    return float((inputs @ (refitted(weight, inputs, kept) - weight).T).square().sum())


@pytest.mark.parametrize("groups", [ONES, THREES], ids=["neurons", "heads"])
def test_each_round_removes_what_costs_least_after_refitting(problem, groups):
    weight, inputs = problem
    order, losses = removal_order(weight, inputs.T @ inputs, groups, damping=0.0, step=1)
    assert len(order) == len(losses) == len(groups) - 1 and len(set(order.tolist())) == len(order)
    gone, total = [], 0.0
    for unit, loss in zip(order.tolist(), losses.tolist(), strict=True):
        costs = {
            other: output_loss(weight, inputs, columns_left(groups, [*gone, other]))
            for other in range(len(groups))
            if other not in gone
        }
        assert unit == min(costs, key=costs.get)
        gone, total = [*gone, unit], total + loss
        assert total == pytest.approx(costs[unit], rel=1e-8)


@pytest.mark.parametrize("groups", [ONES, THREES], ids=["neurons", "heads"])
def test_losses_of_a_damped_problem_are_those_of_its_best_weights(problem, groups):
    weight, inputs = problem
    gram = inputs.T @ inputs
    ridge = 0.1 * float(gram.diagonal().mean())
    order, losses = removal_order(weight, gram, groups, count=2, damping=0.1, step=1)
    best = float("inf")
    for gone in combinations(range(len(groups)), 1):
        kept = columns_left(groups, gone)
        whole = gram + ridge * torch.eye(12, dtype=gram.dtype)
        error = weight.clone()
        error[:, kept] = -weight[:, ~kept] @ whole[~kept][:, kept] @ torch.linalg.inv(whole[kept][:, kept])
        best = min(best, float(torch.trace(error @ whole @ error.T)))
    assert float(losses[0]) == pytest.approx(best, rel=1e-8)


def test_units_that_go_together_share_their_loss(problem):
    weight, inputs = problem
    gram = inputs.T @ inputs
    order, losses = removal_order(weight, gram, ONES, count=7, damping=0.0, step=3)
    assert len(order) == 7 and losses[0] == losses[2] and losses[3] == losses[5] != losses[6]
    for end in (3, 6, 7):
        wanted = output_loss(weight, inputs, columns_left(ONES, order[:end]))
        assert float(losses[:end].sum()) == pytest.approx(wanted, rel=1e-8)


def test_many_neurons_at_a_time_choose_nearly_as_well_as_one():
    generator = torch.Generator().manual_seed(1)
    inputs = torch.randn(900, 300, generator=generator) @ torch.randn(300, 300, generator=generator)
    weight, groups = torch.randn(20, 300, generator=generator), torch.arange(300).view(-1, 1)
    gram = inputs.T @ inputs
    one, three = (float(removal_order(weight, gram, groups, 150, step=s)[1].sum()) for s in (1, 3))
    assert three == pytest.approx(one, rel=0.02)
    assert torch.equal(removal_order(weight, gram, groups, 9)[0], removal_order(weight, gram, groups, 9, step=3)[0])


@pytest.mark.parametrize("groups", [ONES, THREES], ids=["neurons", "heads"])
def test_without_repair_each_round_removes_what_adds_least(problem, groups):
    weight, inputs = problem
    order, losses = order_without_repair(weight, inputs.T @ inputs, groups)

    def lost(gone):
        return float((inputs @ (weight * ~columns_left(groups, gone)).T).square().sum())

    gone, total = [], 0.0
    for unit, loss in zip(order.tolist(), losses.tolist(), strict=True):
        costs = {other: lost([*gone, other]) for other in range(len(groups)) if other not in gone}
        assert unit == min(costs, key=costs.get)
        gone, total = [*gone, unit], total + loss
        assert total == pytest.approx(costs[unit], rel=1e-8)


def test_losses_of_single_units(problem):
    weight, inputs = problem
    wanted = [
        sum(float((inputs[:, j : j + 1] @ weight[:, j : j + 1].T).square().sum()) for j in unit) for unit in THREES
    ]
    found = unit_losses(weight, inputs.T @ inputs, THREES)
    torch.testing.assert_close(found, torch.tensor(wanted, dtype=torch.float64))


@pytest.mark.parametrize("damping", [0.0, 0.05])
def test_the_repair_is_least_squares_drawn_to_the_old_weights(problem, damping):
    weight, inputs = problem
    gram, kept = inputs.T @ inputs, columns_left(ONES, [0, 3, 4, 9])
    ridge = damping * float(gram.diagonal().mean())
    found = repair(weight, gram, kept, damping)
    torch.testing.assert_close(found, refitted(weight, inputs, kept, ridge))
    assert not found[:, ~kept].any()
    assert torch.equal(repair(weight, gram, torch.ones(12, dtype=torch.bool), damping), weight)
    assert not repair(weight, gram, torch.zeros(12, dtype=torch.bool), damping).any()


def test_a_strong_damping_leaves_the_weights_as_they_were(problem):
    weight, inputs = problem
    kept = columns_left(ONES, [1])
    torch.testing.assert_close(
        repair(weight, inputs.T @ inputs, kept, 1e9)[:, kept], weight[:, kept], atol=1e-6, rtol=1e-6
    )


def test_what_never_comes_in_or_is_never_used_goes_first_and_costs_nothing(problem):
    weight, inputs = problem
    weight[:, 5], inputs[:, 7] = 0, 0
    order, losses = removal_order(weight, inputs.T @ inputs, ONES, damping=0.01, step=1)
    assert set(order[:2].tolist()) == {5, 7} and float(losses[1]) < 1e-4 * float(losses[2])
    assert torch.isfinite(repair(weight, inputs.T @ inputs, columns_left(ONES, order[:6]))).all()


def test_float32_is_enough(problem):
    weight, inputs = (tensor.float() for tensor in problem)
    exact = removal_order(weight.double(), (inputs.T @ inputs).double(), THREES, step=1)
    rough = removal_order(weight, inputs.T @ inputs, THREES, step=1)
    assert torch.equal(exact[0], rough[0]) and rough[1].dtype == torch.float32
    torch.testing.assert_close(rough[1].double(), exact[1], atol=0, rtol=1e-3)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"groups": torch.arange(12)}, "groups must be int64 of shape"),
        ({"groups": torch.tensor([[0], [0]])}, "each once"),
        ({"groups": torch.tensor([[0], [12]])}, "columns from 0 to 11"),
        ({"count": 12}, "count=12 must be less than the 12 units"),
        ({"count": -1}, "count=-1"),
        ({"step": 0}, "step=0"),
        ({"damping": -1.0}, "damping=-1.0"),
        ({"gram": torch.eye(11, dtype=torch.float64)}, "gram has shape"),
        ({"gram": torch.full((12, 12), float("nan"), dtype=torch.float64)}, "gram holds NaN"),
    ],
)
def test_what_cannot_be_is_told(problem, change, message):
    weight, inputs = problem
    arguments = {"weight": weight, "gram": inputs.T @ inputs, "groups": ONES} | change
    with pytest.raises(ValueError, match=message):
        removal_order(**arguments)


def test_a_wrong_mask_of_columns_is_told(problem):
    weight, inputs = problem
    with pytest.raises(ValueError, match="kept must be bool of shape"):
        repair(weight, inputs.T @ inputs, torch.ones(12))
