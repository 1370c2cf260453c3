"""`torch.compile`: no graph breaks in a training step, and the same masks."""

import pytest
import torch
from helpers.methods import final_adapter, prune
from helpers.models import logits, make_bert
from peft import PeftModel

from peft_prune import create_pruning_optimizer, update_schedule
from peft_prune.layers.layer import pruning_layers


def train(batch, compiled):
    model = prune(make_bert(), 0.8, allocation="score", penalty=50.0)
    optimizer = create_pruning_optimizer(model, 1e-3)
    model.train()
    update_schedule(model, 0, 8)
    base = model.get_base_model()
    step_model = torch.compile(base, backend="aot_eager", fullgraph=True) if compiled else base
    for step in range(8):
        step_model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        update_schedule(model, step + 1)
    return pruning_layers(model)


@pytest.mark.slow
def test_training_is_one_graph_and_the_same(batch):
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()  # those of other tests
    for eager, compiled in zip(train(batch, False), train(batch, True), strict=True):
        torch.testing.assert_close(eager.scores["default"], compiled.scores["default"])
        assert (eager.get_mask("default") == compiled.get_mask("default")).float().mean() > 0.999
    assert not torch._dynamo.utils.counters["graph_break"]


@pytest.mark.slow
def test_a_loaded_mask_compiles(tmp_path, batch):
    torch._dynamo.reset()
    expected = logits(final_adapter(tmp_path, at=0.8), batch)
    model = PeftModel.from_pretrained(make_bert(), tmp_path)
    compiled = torch.compile(model, backend="aot_eager")
    for _ in range(2):
        torch.testing.assert_close(logits(compiled, batch), expected)
