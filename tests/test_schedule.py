"""Schedules, score initialisation and the penalty's closed form."""

import pytest
import torch

from peft_prune.importance.penalty import sigmoid_penalty, sigmoid_penalty_grad
from peft_prune.importance.start import initial_scores
from peft_prune.selection.curve import Schedule


def test_cubic_is_the_papers_formula():
    final_density = 0.1
    schedule = Schedule(0.0, 1 - final_density, end=0.6)
    for step in range(101):
        share = min(step / 60, 1.0)
        density = final_density + (1 - final_density) * (1 - share) ** 3
        assert 1 - schedule.at(step, 100) == pytest.approx(density, abs=1e-12)
    assert schedule.at(60, 100) == schedule.at(100, 100) == 0.9


@pytest.mark.parametrize(("curve", "middle"), [("linear", 0.5), ("cubic", 0.2 + 0.6 * 0.875), ("constant", 0.8)])
def test_start_end_and_shape(curve, middle):
    schedule = Schedule(0.2, 0.8, start=0.2, end=0.6, curve=curve)
    assert schedule.at(19, 100) == 0.2
    assert schedule.at(40, 100) == pytest.approx(middle)
    assert schedule.at(60, 100) == 0.8


def test_penalty_gradient_is_autograds():
    torch.manual_seed(0)
    scores = torch.randn(5, 6, dtype=torch.float64, requires_grad=True)
    (7.0 * torch.sigmoid(scores).mean()).backward()
    closed = sigmoid_penalty_grad(scores.detach(), torch.tensor(7.0 / 30, dtype=torch.float64))
    torch.testing.assert_close(closed, scores.grad)
    assert sigmoid_penalty(scores).item() == pytest.approx(torch.sigmoid(scores).mean().item(), abs=1e-6)


def test_score_inits():
    weight = torch.randn(40, 30)
    assert not initial_scores(weight, "zeros").any()
    magnitude = initial_scores(weight, "magnitude")
    assert torch.equal(magnitude.reshape(-1).argsort(), weight.abs().reshape(-1).argsort())
    assert initial_scores(weight.bfloat16(), "random").dtype == torch.float32
    with pytest.raises(ValueError, match="score_init='ones'"):
        initial_scores(weight, "ones")
