"""Masks and values: no wrong answer without a word, and nothing lost that was trained."""

import copy
import json
import warnings

import pytest
import torch
from helpers.methods import adapter, advance, config
from helpers.models import logits, make_bert, make_llama
from peft import PeftConfig, PeftModel, get_peft_model
from torch import nn

from peft_prune import (
    MovementPruningConfig,
    PPruningConfig,
    SMPConfig,
    calibrate,
    create_pruning_optimizer,
    finalize,
    prune_once,
    update_schedule,
)
from peft_prune.layers.layer import pruning_layers
from peft_prune.selection.allocation import allocate_by_score, allocate_globally
from peft_prune.storage.values import decode_values, encode_values


def jitter(model, seed=3):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model


def trained(base, config):
    model = jitter(get_peft_model(base, config))
    update_schedule(model, 1, 1)
    return model


# ------------------------------------------------------------------ 1: a matrix that keeps no weight


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16", "int8"])
def test_no_values_are_stored_and_read(dtype):
    nothing = torch.zeros(3, 4, dtype=torch.bool)
    stored = encode_values(torch.randn(3, 4), nothing, dtype)
    assert torch.equal(decode_values(stored, nothing, dtype), torch.zeros(3, 4))


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16", "int8"])
def test_a_matrix_of_zeros_is_saved_loaded_and_merged(tmp_path, batch, dtype):
    base = make_bert()
    with torch.no_grad():
        for layer in base.bert.encoder.layer:
            layer.output.dense.weight[:, ::2] = 0
        base.bert.encoder.layer[0].attention.self.query.weight.zero_()
    sparse = copy.deepcopy(base)
    model = trained(base, MovementPruningConfig(from_existing_zeros=True, value_dtype=dtype))
    expected = logits(model, batch)
    finalize(model)
    close = {"atol": 0.05, "rtol": 0} if dtype != "float32" else {}
    torch.testing.assert_close(logits(model, batch), expected, **close)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(copy.deepcopy(sparse), tmp_path)
    assert torch.equal(logits(loaded, batch), logits(model, batch))
    merged = loaded.merge_and_unload()
    assert not merged.bert.encoder.layer[0].attention.self.query.weight.any()
    torch.testing.assert_close(logits(merged, batch), logits(model, batch))


# ------------------------------------------------------------------ 2, 3: compiled models


def _change_scores(model):
    jitter(model, 9)
    update_schedule(model, 1, 1)


def _base_weights(model):
    state = {
        key: value + 0.3 if key.endswith("query.base_layer.weight") else value
        for key, value in model.state_dict().items()
    }
    model.load_state_dict(state)


CHANGES = {
    "calibrate": (lambda: get_peft_model(make_bert(), PPruningConfig(criterion="random")), calibrate),
    "prune_once": (lambda: jitter(get_peft_model(make_bert(), config("dsee"))), prune_once),
    "finalize with int8": (lambda: trained(make_bert(), MovementPruningConfig(value_dtype="int8")), finalize),
    "update_schedule": (lambda: trained(make_bert(), SMPConfig()), _change_scores),
    "load_state_dict of base weights": (lambda: adapter(make_bert(), "smp"), _base_weights),
}


@pytest.mark.slow
@pytest.mark.parametrize("case", CHANGES)
def test_a_compiled_eval_model_sees_every_change(case, batch):
    make, change = CHANGES[case]
    model = make().eval()
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="eager")
    for _ in range(2):
        before = logits(compiled, batch)
    change(model)
    after = logits(compiled, batch)
    model.train()
    model.eval()  # whatever an eager model had cached is gone
    assert torch.equal(after, logits(model, batch))
    assert not torch.equal(after, before)


@pytest.mark.slow
def test_a_compiled_eval_model_sees_an_adapter_loaded_over_another(tmp_path, batch):
    for name, seed in (("one", 1), ("two", 2)):
        model = jitter(get_peft_model(make_bert(), SMPConfig()), seed)
        update_schedule(model, 1, 1)
        finalize(model)
        model.save_pretrained(tmp_path / name)
    model = PeftModel.from_pretrained(make_bert(), tmp_path / "one")
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="eager")
    for _ in range(2):
        before = logits(compiled, batch)
    model.delete_adapter("default")
    model.load_adapter(tmp_path / "two", "default")
    model.set_adapter("default")
    expected = logits(PeftModel.from_pretrained(make_bert(), tmp_path / "two"), batch)
    assert torch.equal(logits(compiled, batch), expected) and not torch.equal(expected, before)


@pytest.mark.slow
def test_a_compiled_training_model_sees_prune_once(batch):
    model = jitter(get_peft_model(make_bert(), config("dsee"))).train()
    update_schedule(model, 0, 10)
    torch._dynamo.reset()
    compiled = torch.compile(model.get_base_model(), backend="eager")
    dense = compiled(**batch).logits
    prune_once(model)
    pruned = compiled(**batch).logits
    assert torch.equal(pruned, model.get_base_model()(**batch).logits) and not torch.equal(pruned, dense)


# ------------------------------------------------------------------ 5: finalize fails, and nothing is lost


def too_large_for_half(model):
    layer = pruning_layers(model)[-1]
    with torch.no_grad():
        layer.update["default"].copy_(1e6 * layer.get_mask("default"))


def not_finite(model):
    with torch.no_grad():
        pruning_layers(model)[-1].update["default"].fill_(float("nan"))


@pytest.mark.parametrize("spoil", [too_large_for_half, not_finite])
def test_a_finalize_that_fails_changes_nothing(spoil, batch):
    model = trained(make_bert(), MovementPruningConfig(value_dtype="float16"))
    before = copy.deepcopy(model.state_dict())
    with torch.no_grad():
        update = pruning_layers(model)[-1].update["default"]
        saved = update.clone()
        spoil(model)
    with pytest.raises(ValueError, match="layer.1.output.dense.*(not finite|NaN)|NaN"):
        finalize(model)
    with torch.no_grad():
        update.copy_(saved)
    after = model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)
    assert not model.peft_config["default"].finalized and model.peft_config["default"].mask_info is None
    finalize(model)  # its advice can be followed
    assert model.peft_config["default"].finalized


def test_dsee_with_an_update_that_is_not_finite_stays_as_it_is():
    model = advance(get_peft_model(make_bert(), config("dsee")), "dsee")
    layer = next(layer for layer in reversed(pruning_layers(model)) if "default" in layer.held("A"))
    with torch.no_grad():
        layer.held("A")["default"][0, 0] = float("nan")
    keys = set(model.state_dict())
    with pytest.raises(ValueError, match="not finite"):
        finalize(model)
    assert set(model.state_dict()) == keys and not model.peft_config["default"].finalized


# ------------------------------------------------------------------ 8: asked and not reached


def reached(model):
    layers = pruning_layers(model)
    return 1 - sum(int(layer.get_mask("default").sum()) for layer in layers) / sum(
        layer.shape[0] * layer.shape[1] for layer in layers
    )


@pytest.mark.parametrize("asked", [0.25, 0.75])
def test_heads_that_cannot_be_halved_warn_before_training_and_after(asked):
    config = SMPConfig(sparsity=asked, granularity="head", target_modules=["k_proj", "v_proj"])
    with pytest.warns(UserWarning, match=f"{asked:.4f} and will end at"):
        model = get_peft_model(make_llama(), config)  # two key/value groups
    jitter(model)
    update_schedule(model, 1, 1)
    with pytest.warns(UserWarning, match=f"not at the {asked:.4f} asked for"):
        finalize(model)
    assert all(layer.get_mask("default").any() for layer in pruning_layers(model))
    assert model.peft_config["default"].sparsity == pytest.approx(reached(model))


def test_a_row_stays_where_fewer_were_asked_for():
    with pytest.warns(UserWarning, match="0.9900 and will end at"):
        model = get_peft_model(make_bert(), SMPConfig(sparsity=0.99, granularity="row"))
    update_schedule(model, 1, 1)
    rows = [int(layer.get_mask("default").any(1).sum()) for layer in pruning_layers(model)]
    assert rows == [1] * len(rows)


def test_a_weight_of_a_tiny_matrix_stays():
    model = get_peft_model(nn.Sequential(nn.Linear(2, 2)), SMPConfig(sparsity=0.95, target_modules=["0"]))
    update_schedule(model, 1, 1)
    assert int(pruning_layers(model)[0].get_mask("default").sum()) == 1


@pytest.mark.parametrize("how", ["global", "score"])
def test_every_matrix_keeps_a_unit_and_the_sum_is_exact(how):
    scores = [torch.randn(10, 10) + 5, torch.randn(4, 4) - 20, torch.randn(6, 6) - 60]
    if how == "global":
        counts = allocate_globally(scores, 0.5)
    else:
        counts = allocate_by_score(scores, ["a", "a", "a"], 0.5, 1.0)
    assert int(counts.min()) >= 1 and int(counts.sum()) == round(0.5 * (100 + 16 + 36))


def test_a_target_that_is_met_does_not_warn():
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        model = trained(make_bert(), SMPConfig(sparsity=0.37))
        finalize(model)
    assert model.peft_config["default"].sparsity == 0.37


def test_stopped_early_the_config_says_what_was_reached(tmp_path):
    for granularity in ("weight", "2:4"):
        sparsity = 0.8 if granularity == "weight" else None
        model = get_peft_model(make_bert(), SMPConfig(sparsity=sparsity, granularity=granularity))
        update_schedule(model, 1, 10)
        with pytest.warns(UserWarning, match="schedule stands at step 1 of 10"):
            finalize(model)
        model.save_pretrained(tmp_path)
        assert PeftConfig.from_pretrained(tmp_path).sparsity == pytest.approx(reached(model))


# ------------------------------------------------------------------ 12: nothing was removed


@pytest.mark.parametrize("variant", ["soft", "l0"])
def test_a_training_that_removed_nothing_warns(variant, batch):
    model = get_peft_model(make_bert(), MovementPruningConfig(variant=variant))
    optimizer = create_pruning_optimizer(model, 1e-4)
    update_schedule(model, 0, 4)
    for step in range(4):
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        update_schedule(model, step + 1, 4)
    with pytest.warns(UserWarning, match="removed next to nothing.*raise penalty="):
        finalize(model)


# ------------------------------------------------------------------ 26: masks of checkpoints


@pytest.mark.parametrize("method", ["smp", "movement", "dsee"])
def test_half_precision_does_not_change_the_mask_of_a_checkpoint(tmp_path, method):
    model = adapter(make_bert(), method, final=False)
    masks = {layer.module_name: layer.get_mask("default") for layer in pruning_layers(model)}
    model.half().save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(make_bert(), tmp_path, is_trainable=True)
    assert all(torch.equal(layer.get_mask("default"), masks[layer.module_name]) for layer in pruning_layers(loaded))


def test_a_checkpoint_without_bits_finds_its_masks(tmp_path):
    from safetensors.torch import load_file, save_file

    model = adapter(make_bert(), "smp", final=False)
    model.save_pretrained(tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    state = load_file(path)
    save_file({key: value for key, value in state.items() if "smp_bits" not in key}, path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps(config | {"checksums": None}))  # nor were there checksums
    loaded = PeftModel.from_pretrained(make_bert(), tmp_path, is_trainable=True)
    for old, new in zip(pruning_layers(model), pruning_layers(loaded), strict=True):
        assert torch.equal(old.get_mask("default"), new.get_mask("default"))
        assert not old.get_mask("default").all()
