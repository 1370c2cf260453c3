"""Adapters that are merged, combined or used together: the right weights, or an error."""

import numpy as np
import pytest
import torch
from helpers.models import logits, make_bert, make_gpt2
from peft import PeftConfig, get_peft_model

from peft_prune import DSEEConfig, MovementPruningConfig, SMPConfig, finalize, prune_once, update_schedule
from peft_prune.layers.layer import pruning_layers


def _two(config, base=make_bert):
    model = get_peft_model(base(), config(), "a")
    model.add_adapter("b", config())
    for name in ("b", "a"):
        model.set_adapter(name)
        update_schedule(model, 4, total_steps=4)
    return model


def _smp():
    return SMPConfig(sparsity=0.5, score_init="random")


def _dsee(**changes):
    return DSEEConfig(sparsity=0.5, r=4, num_sparse=8, **changes)


def _move(model):
    torch.manual_seed(2)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".dsee_" in name or ".smp_scores_" in name:
                parameter.normal_(0, 0.3)


def test_two_adapters_with_weights_of_their_own_are_not_merged_together():
    for config in (lambda: MovementPruningConfig(variant="magnitude", sparsity=0.5), _dsee):
        model = _two(config)
        before = {name: parameter.clone() for name, parameter in model.named_parameters()}
        with pytest.raises(ValueError, match="weights of their own"):
            model.merge_adapter(["a", "b"])
        assert all(torch.equal(parameter, before[name]) for name, parameter in model.named_parameters())
        model.merge_adapter(["a"])
        with pytest.raises(ValueError, match="weights of their own"):
            model.merge_adapter(["b"])


def test_masks_that_follow_from_weights_are_found_before_these_are_merged(batch):
    model = get_peft_model(make_bert(), SMPConfig(score="low_rank", score_rank=2), "a")
    model.add_adapter("b", SMPConfig(score="low_rank", score_rank=2))
    _move(model)
    for name in ("b", "a"):
        model.set_adapter(name)
        update_schedule(model, 4, total_steps=4)
    model.base_model.set_adapter(["a", "b"])
    expected = logits(model, batch)
    model.set_adapter("a")
    model.merge_adapter(["a", "b"])
    torch.testing.assert_close(logits(model, batch), expected)
    with pytest.raises(ValueError, match="unmerge_adapter"):
        pruning_layers(model)[0].renew("b")


def test_tied_weights_that_are_both_pruned_are_not_merged():
    model = get_peft_model(make_gpt2(), SMPConfig(target_modules=["wte", "lm_head"]))
    with pytest.raises(ValueError, match="shares its weight with 'lm_head'"):
        model.merge_adapter()


def test_masks_are_combined_of_unmerged_weights_only():
    model = _two(_smp)
    finalize(model, "a")
    finalize(model, "b")
    with pytest.raises(ValueError, match="not all 0"):
        model.add_weighted_adapter(["a", "b"], [0.0, 0.0], "c", "majority")
    model.merge_adapter(["a"])
    with pytest.raises(ValueError, match="unmerge_adapter"):
        model.add_weighted_adapter(["a", "b"], adapter_name="c")


def test_updates_of_dsee_are_not_dropped_by_combining_masks():
    model = _two(_dsee)
    finalize(model, "a")
    finalize(model, "b")
    with pytest.raises(ValueError, match="weights of its own"):
        model.add_weighted_adapter(["a", "b"], adapter_name="c")


@pytest.mark.parametrize("low", [False, True])
def test_dsee_by_sample_is_dsee(low, batch):
    model = get_peft_model(make_bert(), _dsee(keep_sparse=True))
    _move(model)
    prune_once(model)
    with torch.autocast("cpu", torch.bfloat16, enabled=low):
        expected = logits(model, batch)
        with torch.no_grad():
            found = model(input_ids=batch["input_ids"], adapter_names=["default"] * 4).logits
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-2 if low else 1e-5)


def test_dsee_pruned_by_hand_is_pruned(recwarn):
    model = get_peft_model(make_bert(), _dsee())
    prune_once(model)
    finalize(model)
    assert not [warning for warning in recwarn if "never pruned" in str(warning.message)]


def test_zeros_that_are_parts_of_blocks_can_be_final(batch):
    base = make_bert()
    weight = base.bert.encoder.layer[0].output.dense.weight
    weight.data[torch.rand(weight.shape) < 0.5] = 0
    model = get_peft_model(base, MovementPruningConfig(from_existing_zeros=True, granularity="2x2"))
    update_schedule(model, 4, total_steps=4)
    expected = logits(model, batch)
    finalize(model)
    assert torch.equal(logits(model, batch), expected)


def test_gates_have_their_noise_without_gradients_too(batch):
    model = get_peft_model(make_bert(), MovementPruningConfig(variant="l0", score_init=0.5)).train()
    update_schedule(model, 1, total_steps=4)
    with torch.no_grad():  # as reentrant checkpointing begins
        found = model(**batch).loss
    torch.testing.assert_close(found, model(**batch).loss, rtol=0, atol=1e-7)


def test_numpy_numbers_of_steps_can_be_saved(tmp_path):
    model = get_peft_model(make_bert(), SMPConfig(total_steps=np.int64(8)))
    model.save_pretrained(tmp_path / "a")
    update_schedule(model, 1, total_steps=np.int64(4))
    model.save_pretrained(tmp_path / "b")
    assert [PeftConfig.from_pretrained(tmp_path / name).total_steps for name in "ab"] == [8, 4]
