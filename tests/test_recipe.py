"""Importance × rule × update × moment: every method says its own, and parts go together."""

import copy
import dataclasses
import json
import math
import re
from pathlib import Path

import pytest
import torch
from helpers import architectures
from helpers.methods import METHODS, adapter, config
from helpers.models import logits, make_bert, make_gpt2, make_llama
from peft import PeftConfig, PeftModel, get_peft_model

import peft_prune
from peft_prune import (
    DSEEConfig,
    MovementPruningConfig,
    PPruningConfig,
    SMPConfig,
    WandaConfig,
    calibrate,
    create_pruning_optimizer,
    finalize,
    update_schedule,
)
from peft_prune.layers.layer import pruning_layers
from peft_prune.methods import __all__ as PUBLIC
from peft_prune.recipe import Moment, Recipe


PACKAGE = Path(peft_prune.__file__).parent


def test_recipes_say_what_methods_are():
    assert SMPConfig(allocation="global").recipe().describe() == {
        "importance": "learned score",
        "rule": "top-k in the model",
        "update": "none",
        "moment": "every step of training",
        "stored": "mask, at most 1 bit per weight",
    }
    assert MovementPruningConfig(variant="soft").recipe().rule.finds_sparsity
    assert MovementPruningConfig(from_existing_zeros=True).recipe().moment is Moment.START
    assert DSEEConfig().recipe().moment is Moment.ONCE and PPruningConfig().recipe().moment is Moment.CALIBRATION
    assert SMPConfig(granularity="2:4").recipe().rule.label == "top-k in the 2:4 group"
    assert not WandaConfig().recipe().trained and DSEEConfig().recipe().trained


def test_no_method_is_named_in_shared_code():
    methods = [name for name in PUBLIC if name.endswith("Config")]
    shared = [path for path in PACKAGE.rglob("*.py") if path.parent.name != "methods" and path.name != "__init__.py"]
    for path in shared:
        code = re.sub(r'""".*?"""|"[^"\n]*"|#.*', "", path.read_text(), flags=re.DOTALL)
        assert not [name for name in methods if name in code], path
    flags = {
        "trains", "gated", "stores_values", "updates_weights", "finds_sparsity", "penalty_offset", "min_density",
        "without_mask",
    }  # fmt: skip
    for kind in (SMPConfig, MovementPruningConfig, DSEEConfig, PPruningConfig, WandaConfig):
        held = set(vars(kind())) | {name for cls in kind.__mro__ for name in vars(cls)}
        assert not flags & held - {field.name for field in dataclasses.fields(kind)}


@pytest.mark.parametrize(
    ("kind", "field"),
    [
        (PPruningConfig, "penalty"), (PPruningConfig, "allocation"), (PPruningConfig, "sparsity_pattern"),
        (DSEEConfig, "score_lr"), (DSEEConfig, "granularity"), (DSEEConfig, "mask_interval"),
        (WandaConfig, "penalty"), (WandaConfig, "schedule_end"),
    ],
)  # fmt: skip
def test_a_field_that_a_method_does_not_use_is_a_type_error(kind, field):
    with pytest.raises(TypeError, match=f"unexpected keyword argument '{field}'"):
        kind(**{field: 1})


@pytest.mark.parametrize("method", ["ppruning", "dsee"])
def test_files_that_hold_fields_of_before_load_without_a_warning(method, tmp_path, recwarn):
    adapter(make_bert(), method).save_pretrained(tmp_path)
    path = tmp_path / "adapter_config.json"
    fields = json.loads(path.read_text()) | {"penalty": 0.0, "allocation": "local", "score_lr": 0.02}
    path.write_text(json.dumps(fields))
    loaded = PeftConfig.from_pretrained(tmp_path)
    assert loaded.finalized and not hasattr(loaded, "penalty")
    assert not [w for w in recwarn if "Unexpected keyword" in str(w.message)]


def test_copies_and_replacements_of_configs_keep_their_fields():
    config = MovementPruningConfig(variant="soft", penalty=7.0)
    assert dataclasses.replace(config, threshold=0.2).recipe().rule.schedule.final == 0.2
    assert dataclasses.replace(PPruningConfig(keep_ratio=0.25), seed=3).keep_ratio == 0.25


@pytest.mark.parametrize("method", METHODS)
def test_nothing_of_a_deleted_adapter_survives(method):
    model = adapter(make_bert(), method, final=False)
    model.add_adapter("other", config(method))
    model.set_adapter("other")
    model.delete_adapter("default")
    for layer in pruning_layers(model):
        assert set(layer.host) == {"other"}
        held = [layer.held(kind) for kind in (*layer.trained_names, *layer.stored_names)]
        assert not any("default" in holder for holder in (*held, layer.penalty_grad))
        dictionaries = [value for value in vars(layer).values() if isinstance(value, dict)]
        assert not any("default" in entry for entry in dictionaries)


# ------------------------------------------------------------------ an update of low rank under a mask


def trained(base, batch, **fields):
    model = get_peft_model(base, MovementPruningConfig(update="low_rank", r=3, **fields)).train()
    optimizer = create_pruning_optimizer(model, 5e-2)
    update_schedule(model, 0, 6)
    for step in range(6):
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        update_schedule(model, step + 1, 6)
    return model.eval()


def by_hand(layer, kept, alpha=16.0):
    """`(W + s·BA) ⊙ M`, from the tensors alone."""
    product = layer.held("B")["default"].detach() @ layer.held("A")["default"].detach()
    return (layer.matrix.detach() + alpha / 3 * product) * kept


@pytest.mark.parametrize("make", [make_bert, make_gpt2])
@pytest.mark.parametrize("fields", [{"sparsity": 0.6}, {"variant": "magnitude", "sparsity": 0.6}, {"variant": "soft"}])
def test_a_low_rank_update_stays_under_the_mask(make, fields, tmp_path, batch):
    if make is make_gpt2:
        batch = {"input_ids": batch["input_ids"], "labels": batch["input_ids"]}
    model = trained(make(), batch, **fields)
    layers = pruning_layers(model)
    assert all(layer.held("B")["default"].abs().sum() > 0 for layer in layers)
    expected = logits(model, batch)
    finalize(model)
    assert torch.equal(logits(model, batch), expected)
    model.save_pretrained(tmp_path)
    size = (tmp_path / "adapter_model.safetensors").stat().st_size
    assert size < sum(layer.matrix.numel() for layer in layers) * 4 / 2, "factors and a mask, and no weights"
    loaded = PeftModel.from_pretrained(make(), tmp_path)
    torch.testing.assert_close(logits(loaded, batch), expected)
    matrices = {layer.module_name: by_hand(layer, layer.get_mask("default")) for layer in pruning_layers(loaded)}
    merged = loaded.merge_and_unload()
    torch.testing.assert_close(logits(merged, batch), expected, atol=1e-5, rtol=1e-4)
    for name, matrix in matrices.items():
        weight = merged.get_submodule(name).weight
        torch.testing.assert_close(weight if weight.shape == matrix.shape and make is make_bert else weight.T, matrix)


def test_a_low_rank_update_of_a_sparse_model_keeps_its_zeros(tmp_path, batch):
    base = make_bert()
    with torch.no_grad():
        for layer in base.bert.encoder.layer:
            for module in (layer.attention.self.query, layer.intermediate.dense):
                module.weight[torch.rand(module.weight.shape, generator=torch.Generator().manual_seed(1)) < 0.5] = 0
    sparse = copy.deepcopy(base)
    model = trained(base, batch, from_existing_zeros=True)
    names = [p for p, v in model.named_parameters() if v.requires_grad and ("movement_A" in p or "movement_B" in p)]
    assert names and not any("scores" in name for name, p in model.named_parameters() if p.requires_grad)
    expected = logits(model, batch)
    finalize(model)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(copy.deepcopy(sparse), tmp_path)
    torch.testing.assert_close(logits(loaded, batch), expected)
    merged = loaded.merge_and_unload()
    torch.testing.assert_close(logits(merged, batch), expected, atol=1e-5, rtol=1e-4)
    for before, after in zip(sparse.bert.encoder.layer, merged.bert.encoder.layer, strict=True):
        for one, two in (
            (before.attention.self.query.weight, after.attention.self.query.weight),
            (before.intermediate.dense.weight, after.intermediate.dense.weight),
        ):
            assert torch.equal(one == 0, two == 0) and not torch.equal(one, two)


def test_gradients_of_a_low_rank_update_are_those_of_autograd():
    torch.manual_seed(0)
    base = torch.nn.Sequential(torch.nn.Linear(12, 10))
    model = get_peft_model(base, MovementPruningConfig(update="low_rank", r=2, sparsity=0.5, target_modules=["0"]))
    (layer,) = pruning_layers(model)
    with torch.no_grad():
        layer.held("B")["default"].normal_()
    update_schedule(model, 1, 1)
    x = torch.randn(7, 12)
    model.train()(x).square().sum().backward()
    a, b = (layer.held(kind)["default"].detach().clone().requires_grad_() for kind in ("A", "B"))
    weight = (layer.matrix.detach() + 8.0 * b @ a) * layer.get_mask("default")
    (x @ weight.T + layer.bias).square().sum().backward()
    torch.testing.assert_close(layer.held("A")["default"].grad, a.grad)
    torch.testing.assert_close(layer.held("B")["default"].grad, b.grad)


# ------------------------------------------------------------------ Wanda: what a method costs


def brute_force(weight, inputs, kept, group):
    """Wanda by hand: of each group of a row the weights with the largest |W|·‖x‖."""
    scores = weight.abs() * inputs.square().sum(0).sqrt()
    rows = scores.reshape(-1, group)
    mask = torch.zeros_like(rows, dtype=torch.bool)
    for row, best in zip(mask, rows.argsort(dim=1, descending=True, stable=True)[:, :kept], strict=True):
        row[best] = True
    return mask.view_as(weight)


def llama_batches():
    generator = torch.Generator().manual_seed(4)
    return [{"input_ids": torch.randint(0, 90, (2, 11), generator=generator)} for _ in range(3)]


@pytest.mark.parametrize(("fields", "kept", "group"), [({"sparsity": 0.5}, 0.5, None), ({"granularity": "2:4"}, 2, 4)])
def test_wanda_is_wanda_block_by_block(fields, kept, group):
    model = get_peft_model(make_llama(), WandaConfig(task_type="CAUSAL_LM", refine=None, **fields))
    reported = calibrate(model, llama_batches())
    assert reported["sparsity"] == pytest.approx(0.5)
    # by hand: inputs of each layer in a model whose blocks before it are pruned, and which is dense from there on
    for block in (0, 1):
        plain = make_llama()
        for layer in pruning_layers(model):
            if int(layer.module_name.split(".")[2]) < block:
                plain.get_submodule(layer.module_name).weight.data.mul_(layer.get_mask("default"))
        for layer in pruning_layers(model):
            if int(layer.module_name.split(".")[2]) != block:
                continue
            seen = []
            module = plain.get_submodule(layer.module_name)
            handle = module.register_forward_pre_hook(lambda m, args, seen=seen: seen.append(args[0].flatten(0, 1)))
            with torch.no_grad():
                for batch in llama_batches():
                    plain(**batch)
            handle.remove()
            size = group or module.weight.shape[1]
            wanted = kept if group else round(kept * size)
            expected = brute_force(module.weight.detach(), torch.cat(seen), wanted, size)
            assert torch.equal(layer.get_mask("default"), expected), layer.module_name


def test_wanda_saves_a_mask_that_loads(tmp_path):
    model = get_peft_model(make_llama(), WandaConfig(task_type="CAUSAL_LM", sparsity=0.5))
    calibrate(model, llama_batches())
    batch = llama_batches()[0]
    expected = logits(model, batch)
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(PeftModel.from_pretrained(make_llama(), tmp_path), batch), expected)


def test_padding_does_not_count_for_wanda():
    padded = []
    for batch in llama_batches():
        ids = torch.nn.functional.pad(batch["input_ids"], (0, 4), value=7)
        padded.append({"input_ids": ids, "attention_mask": (torch.arange(15) < 11).long().expand(2, -1)})
    masks = []
    for batches in (llama_batches(), padded):
        model = get_peft_model(make_llama(), WandaConfig(task_type="CAUSAL_LM", refine=None))
        calibrate(model, batches)
        masks.append(torch.cat([layer.get_mask("default").flatten() for layer in pruning_layers(model)]))
    assert (masks[0] == masks[1]).float().mean() > 0.999  # sums are rounded in another order


@pytest.mark.parametrize("name", ["deberta-v2", "t5", "gpt2", "vit"])
def test_wanda_walks_other_architectures(name):
    model = get_peft_model(architectures.make(name), WandaConfig())
    assert calibrate(model, architectures.batches(name))["sparsity"] == pytest.approx(0.5, abs=0.01)


def test_an_interrupted_calibration_leaves_nothing_half_pruned():
    model = get_peft_model(make_llama(), WandaConfig(task_type="CAUSAL_LM"))
    batch = llama_batches()[0]
    before, keys = logits(make_llama(), batch), set(model.state_dict())
    calls = []

    def interrupt(module, args):
        calls.append(module)
        if len(calls) == 3:
            raise KeyboardInterrupt

    handle = pruning_layers(model)[-1].register_forward_pre_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        calibrate(model, llama_batches())
    handle.remove()
    assert set(model.state_dict()) == keys and torch.equal(logits(model, batch), before)
    calibrate(model, llama_batches())
    assert not torch.equal(logits(model, batch), before)


def test_masks_of_wanda_by_sample_combined_and_merged(batch):
    """At sparsities that no row can have exactly, too: rows keep whole weights, and the config says what is."""
    model = get_peft_model(make_bert(), WandaConfig(sparsity=0.5), "a")
    calibrate(model, [batch])
    model.add_adapter("b", WandaConfig(sparsity=0.8))
    model.set_adapter("b")
    with pytest.warns(UserWarning, match="not at the 0.8000 asked for: each group of units that compete keeps"):
        calibrate(model, [batch])
    layers = pruning_layers(model)
    kept = [int(layer.get_mask("b").sum()) for layer in layers]
    assert model.peft_config["b"].sparsity == pytest.approx(1 - sum(kept) / sum(math.prod(x.shape) for x in layers))
    alone = []
    for name in ("a", "b"):
        model.set_adapter(name)
        alone.append(logits(model, batch))
    names = ["a", "b", *("a" for _ in alone[0][2:])]
    with torch.no_grad():
        together = model(input_ids=batch["input_ids"], adapter_names=names).logits
    torch.testing.assert_close(together, torch.stack([alone[name == "b"][i] for i, name in enumerate(names)]))
    model.add_weighted_adapter(["a", "b"], adapter_name="both", combination_type="intersection")
    for layer in layers:
        assert torch.equal(layer.get_mask("both"), layer.get_mask("a") & layer.get_mask("b"))
    model.set_adapter("both")
    expected = logits(model, batch)
    torch.testing.assert_close(logits(model.merge_and_unload(adapter_names=["a", "b"]), batch), expected)


@pytest.mark.parametrize("granularity", ["row", "head", "4x4"])
def test_wanda_prunes_single_weights_only(granularity):
    with pytest.raises(ValueError, match=f"granularity='{granularity}' is not supported.*Use 'weight'"):
        WandaConfig(granularity=granularity)


def test_a_recipe_is_read_off_every_public_config():
    for name in PUBLIC:
        if name.endswith("Config"):
            recipe = getattr(peft_prune, name)().recipe()
            assert isinstance(recipe, Recipe) and all(recipe.describe().values())
