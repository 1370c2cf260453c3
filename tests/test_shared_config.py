"""One config object for several adapters, or for several models."""

import pytest
import torch
from helpers.models import logits, make_bert
from peft import PeftModel, get_peft_model

from peft_prune import MovementPruningConfig, PPruningConfig, SMPConfig, calibrate, finalize, update_schedule
from peft_prune.layers.layer import pruning_layers


CONFIGS = {
    "smp": lambda: SMPConfig(sparsity=0.5, score_init="random"),
    "soft": lambda: MovementPruningConfig(variant="soft", score_init="random"),
}


def _train_to_the_end(model):
    update_schedule(model, 4, total_steps=4)
    finalize(model)


@pytest.mark.parametrize("name", CONFIGS)
def test_two_adapters_with_one_config_become_final_one_by_one(name, batch, tmp_path):
    config = CONFIGS[name]()
    model = get_peft_model(make_bert(), config, "a")
    model.add_adapter("b", config)
    _train_to_the_end(model)
    first = logits(model, batch)
    assert model.peft_config["a"].finalized and not model.peft_config["b"].finalized
    model.set_adapter("b")
    _train_to_the_end(model)
    second = logits(model, batch)
    model.set_adapter("a")
    assert torch.equal(logits(model, batch), first) and not torch.equal(first, second)
    model.save_pretrained(tmp_path)
    for adapter, expected in (("a", first), ("b", second)):
        loaded = PeftModel.from_pretrained(make_bert(), tmp_path / adapter)
        assert torch.equal(logits(loaded, batch), expected)


@pytest.mark.filterwarnings("ignore:.*is saved with its scores")
def test_scores_are_saved_while_another_adapter_of_the_same_config_is_final(tmp_path):
    config = SMPConfig(sparsity=0.5)
    model = get_peft_model(make_bert(), config, "a")
    model.add_adapter("b", config)
    _train_to_the_end(model)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(make_bert(), tmp_path / "b", is_trainable=True)
    for saved, live in zip(pruning_layers(loaded), pruning_layers(model), strict=True):
        assert torch.equal(saved.scores["default"], live.scores["b"])
    _train_to_the_end(loaded)


@pytest.mark.parametrize("name", CONFIGS)
def test_a_config_serves_for_the_next_model(name, batch):
    config = CONFIGS[name]()
    for _ in range(2):
        model = get_peft_model(make_bert(), config)
        _train_to_the_end(model)
        assert model.peft_config["default"].finalized and not config.finalized


def test_a_config_of_p_pruning_serves_for_the_next_model(batch):
    config = PPruningConfig(keep_ratio=0.5, criterion="magnitude")
    for _ in range(2):
        model = get_peft_model(make_bert(), config)
        calibrate(model)
        assert model.peft_config["default"].finalized and not config.finalized
