"""DSEE against its formula, on real shapes of several architectures."""

import copy
import json
import logging
import re
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from helpers.architectures import inputs, logits, make
from helpers.callbacks import Record
from helpers.data import arguments, data
from helpers.methods import SMALL
from helpers.models import make_bert, make_gpt2, make_llama, snapshot
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import DebertaConfig, DebertaModel

from peft_prune import (
    DSEEConfig,
    MaskFormatError,
    PruningCallback,
    PruningTrainer,
    create_pruning_optimizer,
    finalize,
    merge_keeping_zeros,
    model_size,
    prune_once,
    update_schedule,
)
from peft_prune.layers.layer import pruning_layers
from peft_prune.structure.sites import HEADS, find_sites


def dsee(base, **fields):
    """A model with a random update, before it is pruned."""
    model = get_peft_model(base, DSEEConfig(**SMALL | fields)).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for layer in pruning_layers(model):
            for kind in ("A", "B", "sparse"):
                if "default" in layer.held(kind):
                    parameter = layer.held(kind)["default"]
                    parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    return model


def by_name(model):
    return {layer.module_name: layer for layer in pruning_layers(model)}


def written_down(layer, name="default"):
    """`W ⊙ S1 + s (B A + S2)`, entry by entry."""
    weight = layer.matrix.detach() * layer.get_mask(name)
    if name not in layer.held("A"):
        return weight
    rows = layer.host[name].rows
    rows = range(weight.shape[0]) if rows is None else rows.tolist()
    update = layer.held("B")[name].detach() @ layer.held("A")[name].detach()
    for place, value in zip(layer.held("support")[name].tolist(), layer.held("sparse")[name].tolist(), strict=True):
        update[place // weight.shape[1], place % weight.shape[1]] += value
    for i, row in enumerate(rows):
        weight[row] += layer.config(name).lora_alpha / layer.config(name).r * update[i]
    return weight


@pytest.mark.parametrize("make_model", [make_bert, make_gpt2, make_llama])
@pytest.mark.parametrize("support", ["grebsmo", "random", "magnitude"])
def test_forward_is_the_formula(make_model, support):
    model = dsee(make_model(), support=support, sparsity=0.4)
    prune_once(model)
    for layer in pruning_layers(model):
        x = torch.randn(2, 5, layer.shape[1])
        base = layer.get_base_layer()
        expected = F.linear(x, written_down(layer), base.bias)
        torch.testing.assert_close(layer(x), expected, atol=1e-5, rtol=1e-4)
    ids = {"input_ids": torch.arange(12).view(2, 6)}
    adapted = logits(model, ids)
    torch.testing.assert_close(logits(model.merge_and_unload(), ids), adapted, atol=1e-5, rtol=1e-4)


def test_places_are_those_that_the_config_asks_for():
    torch.manual_seed(0)
    base, planted = make_bert(), {}
    for block, layer in enumerate(base.bert.encoder.layer):
        for name in ("query", "value"):
            low = torch.randn(32, 3) @ torch.randn(3, 32)
            holes = (low.abs() > 2).flatten().nonzero().flatten()
            holes = holes[torch.randperm(len(holes))[:7]].sort().values
            low.view(-1)[holes] = 0  # what the low rank explains least, and the smallest magnitudes of all
            getattr(layer.attention.self, name).weight.data.copy_(low)
            planted[f"bert.encoder.layer.{block}.attention.self.{name}"] = holes

    def places(**fields):
        model = get_peft_model(copy.deepcopy(base), DSEEConfig(**SMALL | fields))
        return {name: by_name(model)[name].held("support")["default"].tolist() for name in planted}

    assert places(support="grebsmo") == {name: holes.tolist() for name, holes in planted.items()}
    for name, found in places(support="magnitude").items():
        weight = base.get_submodule(name).weight.detach().abs().flatten()
        assert found == sorted(weight.argsort(descending=True)[:7].tolist())
    drawn = places(support="random")
    assert drawn == places(support="random") != places(support="random", seed=1)
    assert len({tuple(found) for found in drawn.values()}) == 4, "each matrix has its own"


def test_dropout_is_before_the_update_and_in_training_only():
    model = dsee(make_bert(), sparsity=0.4, lora_dropout=0.5)
    prune_once(model)
    layer = by_name(model)["bert.encoder.layer.0.attention.self.query"]
    masked, x = layer.matrix.detach() * layer.get_mask("default"), torch.randn(3, 4, 32)
    update, bias = written_down(layer) - masked, layer.get_base_layer().bias
    for training in (True, False):
        layer.train(training)
        torch.manual_seed(5)
        found = layer(x)
        torch.manual_seed(5)
        expected = F.linear(x, masked, bias) + F.linear(F.dropout(x, 0.5, training), update)
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)


def test_gradients_are_those_of_the_formula():
    model = dsee(make_bert(), sparsity=0.4)
    prune_once(model)
    layer = by_name(model)["bert.encoder.layer.0.attention.self.query"]
    a, b, sparse = (layer.held(kind)["default"].detach().clone().requires_grad_() for kind in ("A", "B", "sparse"))
    x, target = torch.randn(3, 4, 32), torch.randn(3, 4, 32)
    F.mse_loss(layer(x), target).backward()
    s2 = torch.zeros(32 * 32).index_add(0, layer.held("support")["default"], sparse).view(32, 32)
    weight = layer.matrix.detach() * layer.get_mask("default") + 2.0 * (b @ a + s2)
    F.mse_loss(F.linear(x, weight, layer.get_base_layer().bias.detach()), target).backward()
    for kind, expected in (("A", a), ("B", b), ("sparse", sparse)):
        torch.testing.assert_close(layer.held(kind)["default"].grad, expected.grad)
    assert layer.get_base_layer().weight.grad is None


def test_it_starts_as_the_base_and_trains_few_numbers():
    base = make_bert()
    ids = inputs("bert")
    dense = logits(base, ids)
    model = get_peft_model(base, DSEEConfig(r=2, num_sparse=5))
    assert torch.equal(logits(model.eval(), ids), dense)
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert trainable == 2 * 2 * (2 * (32 + 32) + 5)  # two layers, queries and values
    updated = {name.split(".")[-1] for name, layer in by_name(model).items() if layer.held("A")}
    assert updated == {"query", "value"}
    assert all(layer.held("sparse")["default"].shape == (5,) for layer in by_name(model).values() if layer.held("A"))


def test_fused_projections_update_queries_and_values_only():
    model = dsee(make_gpt2())
    layer = by_name(model)["transformer.h.0.attn.c_attn"]
    change = layer.delta("default")
    assert layer.held("B")["default"].shape == (64, 3)
    assert bool((change[32:64] == 0).all()) and bool((change[:32] != 0).any()) and bool((change[64:] != 0).any())


@pytest.mark.parametrize("importance", ["update", "effective", "weight"])
def test_one_threshold_for_each_of_the_two_groups(importance):
    model = dsee(make_bert(), sparsity=0.5, update_sparsity=0.2, importance=importance)
    prune_once(model)
    for updated, share in ((True, 0.2), (False, 0.5)):
        layers = [layer for layer in pruning_layers(model) if bool(layer.held("A")) == updated]
        values = []
        for layer in layers:
            change = written_down(layer) - layer.matrix.detach() * layer.get_mask("default")
            weight = layer.matrix.detach()
            kinds = {"update": change, "effective": weight + change, "weight": weight}
            values.append((kinds[importance] if updated else weight).abs().flatten())
        masks = torch.cat([layer.get_mask("default").flatten() for layer in layers])
        assert int((~masks).sum()) == round(share * masks.numel())
        assert torch.cat(values)[masks].min() >= torch.cat(values)[~masks].max() - 1e-6


def test_keys_of_a_fused_matrix_are_not_taken_for_an_update_of_zero():
    model = dsee(make_gpt2(), sparsity=0.5, importance="update")
    prune_once(model)
    mask = by_name(model)["transformer.h.0.attn.c_attn"].get_mask("default")
    assert 0.3 < mask[32:64].float().mean() < 0.7


@pytest.mark.parametrize("name", ["bert", "roberta", "gpt2", "deberta-v2", "llama", "distilbert", "t5"])
def test_heads_and_neurons(name, tmp_path):
    model = dsee(make(name), heads_to_prune=1, neuron_sparsity=0.25)
    sites = find_sites(model)
    prune_once(model)
    for site in sites:
        layer = model.get_submodule(site.output)
        kept = layer.get_mask("default")[0][site.columns].all(1)
        assert int((~kept).sum()) == (1 if site.kind == HEADS else site.units // 4)
        if site.kind == HEADS:
            scores = torch.zeros(site.units)
            for module, rows in site.rows.items():
                each = model.get_submodule(module)
                change = written_down(each) - each.matrix.detach() * each.get_mask("default")
                scores += change.abs().sum(1)[rows].sum(1)
            assert int(scores.argmin()) == int((~kept).nonzero())
        else:
            squares = layer.matrix.detach().square().sum(0)[site.columns].sum(1)
            for module, rows in site.rows.items():
                squares += model.get_submodule(module).matrix.detach().square().sum(1)[rows].sum(1)
            assert squares[~kept].max() <= squares[kept].min(), "neurons with the smallest weights go"
    finalize(model)
    masked = logits(model, inputs(name))
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(make(name), tmp_path)
    assert torch.equal(logits(again, inputs(name)), masked)
    before = model_size(make(name), 10)
    smaller = again.merge_and_unload()
    after = model_size(smaller, 10)
    assert after.neurons == before.neurons * 3 // 4 and after.heads < before.heads
    torch.testing.assert_close(logits(smaller, inputs(name)), masked, atol=1e-4, rtol=1e-4)


def test_files_are_small_and_come_back(tmp_path):
    model = dsee(make_bert(), sparsity=0.5)
    prune_once(model)
    live = logits(model, inputs("bert"))
    finalize(model)
    assert torch.equal(logits(model, inputs("bert")), live)
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    kinds = {key.rsplit("dsee_", 1)[1] for key in tensors}
    assert kinds == {"A", "B", "sparse", "support", "mask"}
    stored = sum(t.numel() for key, t in tensors.items() if key.endswith("_mask"))
    assert stored < 1.2 * sum(layer.matrix.numel() for layer in pruning_layers(model)) / 8
    again = PeftModel.from_pretrained(make_bert(), tmp_path, is_trainable=True)
    assert torch.equal(logits(again.eval(), inputs("bert")), live)
    plain = make_bert()
    plain.load_adapter(str(tmp_path))  # Transformers' own road
    assert torch.equal(logits(plain.eval(), inputs("bert")), live)


@pytest.mark.parametrize("place", [-1, 10**6])
def test_places_outside_of_the_matrix_are_told(place, tmp_path):
    model = dsee(make_bert(), sparsity=0.5)
    prune_once(model)
    finalize(model)
    model.save_pretrained(tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    tensors = load_file(file)
    key = next(key for key in tensors if key.endswith("_support"))
    tensors[key][3] = place
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(MaskFormatError, match=f"positions from .*{place}"):
        PeftModel.from_pretrained(make_bert(), tmp_path)


def test_targets_without_numbered_blocks_or_a_known_anatomy():
    torch.manual_seed(0)
    model = get_peft_model(torch.nn.Sequential(torch.nn.Linear(8, 8)), DSEEConfig(target_modules=["0"], num_sparse=4))
    assert model.peft_config["default"].prune_target_modules == {"0"}
    config = DebertaConfig(vocab_size=50, hidden_size=32, num_hidden_layers=2, num_attention_heads=4)
    model = get_peft_model(DebertaModel(config), DSEEConfig())
    assert model.peft_config["default"].target_modules == {"in_proj"}  # as for LoRA
    with pytest.raises(ValueError, match="specify `target_modules`.*model_type=None live is not known"):
        get_peft_model(torch.nn.Sequential(torch.nn.Linear(8, 8)), DSEEConfig())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_update_has_the_dtype_that_is_asked_for(dtype):
    for cast, expected in ((True, torch.float32), (False, dtype)):
        model = get_peft_model(make_bert().to(dtype), DSEEConfig(num_sparse=4), autocast_adapter_dtype=cast)
        assert {p.dtype for name, p in model.named_parameters() if "dsee_" in name} == {expected}


def test_merging_sparse_or_exact(caplog):
    def merged(**arguments):
        model = dsee(make_bert(), sparsity=0.5, update_sparsity=0.5)
        prune_once(model)
        mask = by_name(model)["bert.encoder.layer.0.attention.self.query"].get_mask("default")
        exact = logits(model, inputs("bert"))
        model = model.merge_and_unload(**arguments)
        return model.bert.encoder.layer[0].attention.self.query.weight, mask, logits(model, inputs("bert")) - exact

    weight, mask, moved = merged()
    assert bool((weight[~mask] != 0).any()) and moved.abs().max() < 1e-5
    with caplog.at_level(logging.WARNING):
        weight, mask, moved = merged(keep_sparse=True, inputs=inputs("bert"))
    assert bool((weight[~mask] == 0).all()) and bool((weight[mask] != 0).all()) and moved.abs().max() > 1e-4
    (record,) = [r.message for r in caplog.records if "norm of the update" in r.message]
    assert f"moved by {float(moved.abs().max()):.3g} at most" in record


def test_merge_and_unmerge_are_bit_exact():
    base = make_bert()
    before = snapshot(base)
    model = dsee(base, sparsity=0.5)
    prune_once(model)
    adapted = logits(model, inputs("bert"))
    model.merge_adapter()
    torch.testing.assert_close(logits(model, inputs("bert")), adapted, atol=1e-5, rtol=1e-4)
    model.unmerge_adapter()
    assert torch.equal(logits(model, inputs("bert")), adapted)
    for layer in pruning_layers(model):
        assert torch.equal(layer.get_base_layer().weight, before[layer.module_name + ".weight"])


def trained(folder, resume=None, **fields):
    """A model that is pruned inside a trainer, all its masks after each step, and their sparsity."""
    torch.manual_seed(0)
    model = get_peft_model(make_bert(), DSEEConfig(task_type="SEQ_CLS", sparsity=0.5, **SMALL | fields))
    record = Record()
    args = arguments(folder, save_strategy="steps", save_steps=5)
    trainer = PruningTrainer(model=model, args=args, train_dataset=data(), callbacks=[PruningCallback(), record])
    trainer.train(resume_from_checkpoint=resume)
    every = [torch.cat([mask.flatten() for mask in step.values()]) for _, step in record.steps]
    return model, every, [float((~mask).float().mean()) for mask in every]


def check_resumes(whole, folder, **fields):
    """A training that is resumed from step 5 ends with the same tensors."""
    resumed, _, _ = trained(folder / "resumed", str(folder / "whole" / "checkpoint-5"), **fields)
    one, two = whole.state_dict(), resumed.state_dict()
    assert one.keys() == two.keys() and all(torch.equal(one[key], two[key]) for key in one)


def test_pruned_once_inside_a_trainer_and_resumed(tmp_path):
    whole, every, sparsities = trained(tmp_path / "whole", prune_at=0.3)
    assert sparsities[:2] == [0, 0] and all(s == pytest.approx(0.5, abs=1e-3) for s in sparsities[2:])
    assert all(torch.equal(every[2], mask) for mask in every[2:]), "pruned once"
    check_resumes(whole, tmp_path, prune_at=0.3)
    assert whole.peft_config["default"].finalized


def test_by_default_what_is_pruned_is_updated_in_stages():
    config = DSEEConfig(sparsity=0.9)
    assert (config.importance, config.threshold, config.prune_from, config.prune_at) == ("effective", "matrix", 0, 0.6)
    stages = config.stages(300)
    assert len(stages) == 20 and max(stages) == 180 and stages[180] == 1.0
    for step, share in stages.items():
        assert share == pytest.approx(1 - (1 - step / 180) ** 3) and step % 9 == 0
    assert config.stages(1) == {1: 1.0} and config.stages(5) == pytest.approx({1: 19 / 27, 2: 26 / 27, 3: 1})
    assert DSEEConfig(prune_from=0.5, prune_at=0.7).stages(10) == {6: pytest.approx(7 / 8), 7: 1.0}

    model = get_peft_model(make_bert(), config)
    assert all(layer.changes_weights("default") for layer in pruning_layers(model))
    units = get_peft_model(make_bert(), DSEEConfig(heads_to_prune=1))  # no single weights go
    assert sum(layer.changes_weights("default") for layer in pruning_layers(units)) == 4


def test_the_papers_form_is_one_field_away():
    paper = DSEEConfig(preset="paper", sparsity=0.5)
    assert (paper.importance, paper.threshold, paper.prune_from, paper.prune_at) == ("update", "model", 0.5, 0.5)
    assert paper.stages(300) == {150: 1.0} and DSEEConfig(preset="paper", prune_at=0.7).stages(10) == {7: 1.0}
    model = get_peft_model(make_bert(), paper)
    assert {name.rsplit(".", 1)[1] for name, layer in by_name(model).items() if layer.changes_weights("default")} == {
        "query", "value"
    }  # fmt: skip


def test_a_file_from_before_there_was_a_preset_is_the_papers(tmp_path):
    expected = DSEEConfig(preset="paper", sparsity=0.5, prune_at=0.75)
    expected.save_pretrained(tmp_path)
    file = tmp_path / "adapter_config.json"
    stored = json.loads(file.read_text())
    for name in ("preset", "checksums", "prune_from", "threshold"):
        del stored[name]
    file.write_text(json.dumps(stored | {"allocation": "local"}))
    assert DSEEConfig.from_pretrained(tmp_path) == expected


def test_each_stage_chooses_anew_by_the_updated_weight():
    model = dsee(make_bert(), preset="auto", sparsity=0.8)
    generator = torch.Generator().manual_seed(1)
    before = {}
    for step in range(11):
        report = update_schedule(model, step, 10)
        share = 1 - (1 - min(1.0, step / 6)) ** 3
        assert report["sparsity"] == pytest.approx(0.8 * share, abs=2e-3)
        for name, layer in by_name(model).items():
            size = (layer.matrix + layer.delta("default")).detach().abs()
            number = round((1 - 0.8 * share) * size.numel())
            if step <= 6:
                expected = size >= size.flatten().sort(descending=True).values[number - 1]
                assert torch.equal(layer.get_mask("default"), expected)
            else:
                assert torch.equal(layer.get_mask("default"), before[name])
            before[name] = layer.get_mask("default")
            with torch.no_grad():
                noise = torch.randn(layer.held("B")["default"].shape, generator=generator)
                layer.held("B")["default"].add_(noise, alpha=0.05)


def test_stages_do_not_bring_back_what_was_pruned_by_hand():
    model = dsee(make_bert(), preset="auto", sparsity=0.8)
    update_schedule(model, 1, 10)
    assert prune_once(model) == pytest.approx(0.8, abs=2e-3)
    assert update_schedule(model, 2, 10)["sparsity"] == pytest.approx(0.8, abs=2e-3)


def test_pruned_in_stages_inside_a_trainer_and_resumed(tmp_path):
    fields = {"preset": "auto", "heads_to_prune": 1, "prune_at": 0.8}
    whole, _, sparsities = trained(tmp_path / "whole", **fields)
    assert sparsities == sorted(sparsities) and len({round(s, 3) for s in sparsities}) > 5
    assert sparsities[6] < 0.5 < sparsities[7] == sparsities[-1], "heads go last"
    check_resumes(whole, tmp_path, **fields)


def test_optimizer_and_warnings():
    model = get_peft_model(make_bert(), DSEEConfig(task_type="SEQ_CLS", sparsity=0.5, **SMALL))
    optimizer = create_pruning_optimizer(model, lr=5e-4, weight_decay=0.1)
    ours = {
        id(p) for layer in pruning_layers(model) for kind in ("A", "B", "sparse") for p in layer.held(kind).values()
    }
    groups = [g for g in optimizer.param_groups if {id(p) for p in g["params"]} & ours]
    assert sum(len(g["params"]) for g in groups) == len(ours) and {g["weight_decay"] for g in groups} == {0.0}
    update_schedule(model, 2, 10)
    with pytest.warns(UserWarning, match=r"never pruned: .*step 2 of 10.*prune_once"):
        finalize(model)


def test_a_lora_on_a_pruned_base_keeps_its_zeros(caplog):
    base = make_bert()
    with torch.no_grad():
        for layer in base.bert.encoder.layer:
            layer.attention.self.query.weight[:, ::2] = 0
    zeros = base.bert.encoder.layer[0].attention.self.query.weight == 0
    config = LoraConfig(target_modules=["query"], init_lora_weights=False)
    dense = get_peft_model(make_bert(), config)
    with pytest.raises(ValueError, match="no adapted weight of the base is zero"):
        merge_keeping_zeros(dense)
    model = get_peft_model(base, config)
    query = model.base_model.model.bert.encoder.layer[0].attention.self.query
    query.unload_and_optionally_merge_module = lambda **kwargs: pytest.fail("it was merged")
    with pytest.raises(ValueError, match="1 of 2 adapted layers, such as Linear, are merged in a way of their own"):
        merge_keeping_zeros(model)
    del query.unload_and_optionally_merge_module
    expected = model.base_model.model.bert.encoder.layer[0].attention.self.query.get_delta_weight("default")
    old = model.base_model.model.bert.encoder.layer[0].attention.self.query.get_base_layer().weight.clone()
    with caplog.at_level(logging.WARNING):
        merged = merge_keeping_zeros(model)
    weight = merged.bert.encoder.layer[0].attention.self.query.weight
    torch.testing.assert_close(weight, (old + expected) * ~zeros)
    assert ((merged.bert.encoder.layer[1].attention.self.query.weight == 0).float().mean(0)[::2] == 1).all()
    lost = 100 * float((expected * zeros).norm() / expected.norm())  # of layers alike, about that of all of them
    assert float(re.search(r"removed ([\d.]+)% of the norm", caplog.text)[1]) == pytest.approx(lost, rel=0.1)


BAD = [
    ({"r": 0}, "r=0"),
    ({"num_sparse": -1}, "num_sparse=-1"),
    ({"support": "svd"}, "'grebsmo', 'random', 'magnitude'"),
    ({"importance": "taylor"}, "'update', 'effective', 'weight'"),
    ({"lora_dropout": 1.0}, "lora_dropout=1.0"),
    ({"prune_at": 0.0}, "prune_at=0.0"),
    ({"prune_from": 0.7}, "prune_from=0.7"),
    ({"threshold": "row"}, "threshold='row'.*'matrix', 'model'"),
    ({"preset": "encoder"}, "preset='encoder'.*'auto', 'paper'"),
    ({"neuron_sparsity": 1.0}, "neuron_sparsity=1.0"),
    ({"update_sparsity": 2}, "update_sparsity=2"),
    ({"heads_to_prune": 1.5}, "heads_to_prune=1.5"),
]


@pytest.mark.parametrize(("fields", "message"), BAD, ids=[str(fields) for fields, _ in BAD])
def test_bad_fields_are_told(fields, message):
    with pytest.raises(ValueError, match=message):
        DSEEConfig(**fields)


def test_misuse_is_told():
    with pytest.raises(ValueError, match="num_sparse=2000 is more than the 1024 weights"):
        get_peft_model(make_bert(), DSEEConfig(num_sparse=2000, support="random"))
    with pytest.raises(ValueError, match="heads_to_prune=4 must be fewer than the 4"):
        prune_once(dsee(make_bert(), heads_to_prune=4))
    with pytest.raises(ValueError, match=r"output.dense' is not among prune_target_modules"):
        prune_once(dsee(make_bert(), heads_to_prune=1, prune_target_modules=["intermediate.dense"]))
    for field in ({"heads_to_prune": 4}, {"heads_to_prune": 1, "target_modules": ["intermediate.dense"]}):
        with pytest.raises(ValueError, match="heads_to_prune"):
            update_schedule(dsee(make_bert(), **field), 0, 10)  # before training, and not in the middle of it
    assert DSEEConfig(prune_at=0.55).final_step(100) == 55 and DSEEConfig(prune_at=0.5).final_step(3) == 2
    with pytest.raises(ValueError, match="is no adapter that prunes once, such as DSEE"):
        prune_once(make_bert())
    assert replace(DSEEConfig(), seed=2).seed == 2
