"""Rows as the groups in which weights compete, and schedules that begin where they end."""

import pytest
import torch
from helpers.models import BERT_TARGET_WEIGHTS, make_bert
from peft import get_peft_model

from peft_prune import SMPConfig, update_schedule
from peft_prune.layers.layer import pruning_layers


@pytest.mark.parametrize(("granularity", "block"), [("weight", (1, 1)), ("4x2", (4, 2)), ("1x8", (1, 8))])
@pytest.mark.parametrize("fields", [{}, {"score": "low_rank", "score_rank": 3}])
def test_units_of_a_row_compete_at_every_step(granularity, block, fields):
    model = get_peft_model(make_bert(), SMPConfig(sparsity=0.75, allocation="row", granularity=granularity, **fields))
    layers = pruning_layers(model)
    with torch.no_grad():
        for layer in layers:
            for kind in ("scores", "scores_A", "scores_B"):
                for scores in layer.held(kind).values():
                    scores.normal_()
    for step in (0, 3, 10):
        update_schedule(model, step, 10)
        density = 1 - 0.75 * (1 - (1 - min(step / 6, 1)) ** 3)
        for layer in layers:
            units = layer.get_mask("default")[:: block[0], :: block[1]]
            whole = units.repeat_interleave(block[0], 0).repeat_interleave(block[1], 1)
            assert torch.equal(whole, layer.get_mask("default"))
            for row, kept in zip(layer.ranking("default").detach(), units, strict=True):
                wanted = round(density * len(row))
                assert sorted(kept.nonzero().flatten().tolist()) == sorted(row.topk(wanted).indices.tolist())
    assert SMPConfig(allocation="row").recipe().rule.label == "top-k in the row"


def test_rows_with_a_sparsity_of_their_own():
    config = SMPConfig(sparsity=0.5, allocation="row", sparsity_pattern={"query": 0.25})
    model = get_peft_model(make_bert(), config)
    update_schedule(model, 10, 10)
    for layer in pruning_layers(model):
        share = 0.75 if layer.module_name.endswith("query") else 0.5
        assert set(layer.get_mask("default").sum(1).tolist()) == {round(share * layer.shape[1])}


@pytest.mark.parametrize("granularity", ["row", "column", "head", "2:4"])
def test_granularities_that_leave_nothing_to_compete_in_a_row_are_told(granularity):
    with pytest.raises(ValueError, match=f"granularity='{granularity}'|allocation='row'"):
        SMPConfig(allocation="row", granularity=granularity)


@pytest.mark.parametrize("fields", [{"sparsity_schedule": "constant"}, {"initial_sparsity": 0.5}])
@pytest.mark.parametrize("allocation", ["local", "row", "score", "global"])
def test_a_schedule_may_begin_at_the_final_sparsity(fields, allocation):
    model = get_peft_model(make_bert(), SMPConfig(sparsity=0.5, allocation=allocation, **fields))
    kept = [sum(int(layer.get_mask("default").sum()) for layer in pruning_layers(model))]
    for step in (0, 1, 10):
        update_schedule(model, step, 10)
        kept.append(sum(int(layer.get_mask("default").sum()) for layer in pruning_layers(model)))
    assert kept == [BERT_TARGET_WEIGHTS // 2] * 4, "from before the first step on"
