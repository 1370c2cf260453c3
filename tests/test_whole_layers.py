"""Whole layers: which ones go, the mask that says so, and the model with fewer blocks."""

import copy
import itertools
import json

import pytest
import torch
import torch.nn.functional as F
from helpers.architectures import ARCHITECTURES, GENERATE, PRENORM, batches, inputs, logits, make
from helpers.models import make_bert, make_llama
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel, LlamaModel, OPTConfig, OPTForCausalLM

from peft_prune import StructuredPruningConfig, calibrate, load_compact, model_size, save_compact, save_standard, shrink
from peft_prune.layers.layer import pruning_layers
from peft_prune.structure.depth import find_stack, remove_blocks
from peft_prune.structure.flops import unit_macs
from peft_prune.structure.sites import find_sites, linear_matrix


def adapter(base, keep_layers, data, **fields):
    fields = {"keep_ratio": 1.0, "sequence_length": 10, "layer_samples": 16, "layer_criterion": "loss"} | fields
    model = get_peft_model(base, StructuredPruningConfig(keep_layers=keep_layers, **fields))
    return model, calibrate(model, data)


def gone(model):
    """Numbers of the blocks of which the masks keep nothing."""
    sites = {"base_model.model." + site.output: site for site in find_sites(model.get_base_model())}
    alive = {}
    for layer in pruning_layers(model):
        block = sites["base_model.model." + layer.module_name].block
        alive.setdefault(int(block.rpartition(".")[2]), []).append(bool(layer.get_mask("default").any()))
    return [number for number, kept in alive.items() if not any(kept)]


def deep(layers=4, seed=3, **changes):
    """A Llama whose blocks matter, each differently."""
    model = make_llama(num_hidden_layers=layers, **changes)
    generator = torch.Generator().manual_seed(seed)
    for number, block in enumerate(model.model.layers):
        for parameter in block.parameters():
            if parameter.dim() > 1:
                scale = 0.1 + 0.15 * ((number * 2) % layers)
                parameter.data.copy_(scale * torch.randn(parameter.shape, generator=generator))
    return model.eval()


def texts(vocabulary=90, count=3):
    generator = torch.Generator().manual_seed(5)
    data = [{"input_ids": torch.randint(3, vocabulary, (2, 11), generator=generator)} for _ in range(count)]
    for batch in data:
        batch["attention_mask"] = torch.ones_like(batch["input_ids"])
    data[1]["attention_mask"][1, 7:] = 0
    return data


def empty(model, numbers, stack="model.layers"):
    """Zeros in all that blocks put out; their biases stay."""
    model = copy.deepcopy(model)
    with torch.no_grad():
        for site in find_sites(model):
            if site.block in {f"{stack}.{number}" for number in numbers}:
                linear_matrix(model.get_submodule(site.output)).zero_()
    return model


def divergence(dense, other, data):
    """KL divergence of the dense model's next-token distribution, sum over tokens that are no padding."""
    total = 0.0
    for batch in data:
        with torch.no_grad():
            p, q = (F.softmax(model(**batch).logits.double(), -1) for model in (dense, other))
        total += float(((p * (p / q).log()).sum(-1) * batch["attention_mask"]).sum())
    return total


# ------------------------------------------------------------------ every architecture


@pytest.mark.parametrize("name", PRENORM)
def test_masked_and_shorter_models_compute_the_same(name, tmp_path):
    batch = inputs(name)
    model, shares = adapter(make(name), 2, batches(name))
    removed = gone(model)
    assert len(removed) == 1 and removed != [0]
    assert shares["flops"] == pytest.approx(2 / 3)
    masked = logits(model, batch)
    with model.disable_adapter():
        assert torch.equal(logits(model, batch), logits(make(name), batch))
    model.save_pretrained(tmp_path / "adapter")
    tensors = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert all(key.endswith("structured_mask") for key in tensors), "nothing is repaired where layers go whole"
    again = PeftModel.from_pretrained(make(name), tmp_path / "adapter")
    assert torch.equal(logits(again, batch), masked)

    shorter = again.merge_and_unload()
    assert len(find_stack(shorter).blocks) == shorter.config.num_hidden_layers == 2
    torch.testing.assert_close(logits(shorter, batch), masked, atol=1e-5, rtol=1e-5)
    assert model_size(shorter, 10).macs * 3 == model_size(make(name), 10).macs * 2
    save_compact(shorter, tmp_path / "compact")
    for loaded in (
        load_compact(tmp_path / "compact"),
        type(shorter).from_pretrained(tmp_path / "compact", attn_implementation="eager"),
    ):
        torch.testing.assert_close(logits(loaded.eval(), batch), masked, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", [name for name in PRENORM if name in GENERATE])
def test_shorter_models_generate_with_a_cache(name):
    model, _ = adapter(make(name, "sdpa"), 2, batches(name))
    batch = inputs(name, batch=1)
    arguments = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False}
    expected = model.generate(**batch, **arguments)
    shorter = model.merge_and_unload()
    for how in ({}, {"use_cache": False}, {"cache_implementation": "static"}):
        assert torch.equal(shorter.generate(**batch, **arguments, **how), expected), how


def test_lists_of_the_config_follow():
    config = {"layer_types": ["sliding_attention", "full_attention", "sliding_attention", "full_attention"]}
    base = make("gemma3_text")
    torch.manual_seed(0)
    fields = base.config.to_dict() | config | {"num_hidden_layers": 4}
    base = type(base)(type(base.config)(**fields)).eval()
    shorter = remove_blocks(empty(base, [2]), ["model.layers.2"])
    assert shorter.config.layer_types == ["sliding_attention", "full_attention", "full_attention"]
    assert [block.self_attn.layer_idx for block in shorter.model.layers] == [0, 1, 2]
    assert base.config.num_hidden_layers == 4, "the config of the other model is its own"
    batch = inputs("gemma3_text")
    torch.testing.assert_close(logits(shorter, batch), logits(empty(base, [2]), batch), atol=1e-5, rtol=1e-5)


# ------------------------------------------------------------------ the choice


def test_influence_is_what_hooks_see():
    base, data = deep(), texts()
    influence = []
    for block in base.model.layers:
        seen = []
        handle = block.register_forward_hook(lambda m, args, output, seen=seen: seen.append((args[0], output)))
        with torch.no_grad():
            for batch in data:
                base(**batch)
        handle.remove()
        cosines = []
        for (states, output), batch in zip(seen, data, strict=True):
            states, output = states.double(), (output[0] if isinstance(output, tuple) else output).double()
            cosine = (states * output).sum(-1) / states.norm(dim=-1) / output.norm(dim=-1)
            cosines.append(cosine[batch["attention_mask"].bool()])
        influence.append(float(1 - torch.cat(cosines).mean()))
    least = sorted(range(1, 4), key=influence.__getitem__)
    for count in (1, 2):
        model, _ = adapter(deep(), 4 - count, data, layer_criterion="influence")
        assert gone(model) == sorted(least[:count])


@pytest.mark.parametrize("seed", range(4))
def test_one_of_four_layers_by_loss_is_the_best_of_all(seed):
    losses = {n: divergence(deep(seed=seed), empty(deep(seed=seed), [n]), texts()) for n in (1, 2, 3)}
    assert gone(adapter(deep(seed=seed), 3, texts())[0]) == [min(losses, key=losses.get)]


@pytest.mark.parametrize("seed", range(4))
def test_several_layers_by_loss_are_the_greedy_choice(seed):
    removed = []
    for _ in range(3):
        left = [n for n in range(1, 6) if n not in removed]
        base = deep(6, seed)
        removed.append(min(left, key=lambda n: divergence(base, empty(base, [*removed, n]), texts())))
        assert gone(adapter(deep(6, seed), 6 - len(removed), texts())[0]) == sorted(removed)


def test_biases_of_a_layer_that_goes_are_part_of_its_loss():
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=90, n_positions=32, n_embd=32, n_layer=4, n_head=4)
    base = GPT2LMHeadModel(config).eval()
    for parameter in base.parameters():
        parameter.data.normal_(0, 0.2)
    losses = {}
    for n in (1, 2, 3):
        losses[n] = divergence(base, empty(base, [n], "transformer.h"), texts())
    model, _ = adapter(copy.deepcopy(base), 3, texts())
    assert gone(model) == [min(losses, key=losses.get)]
    pairs = {p: divergence(base, empty(base, p, "transformer.h"), texts()) for p in itertools.combinations(losses, 2)}
    model, _ = adapter(copy.deepcopy(base), 2, texts())
    chosen = tuple(gone(model))
    ours = divergence(base, model, texts())
    assert ours == pytest.approx(pairs[chosen], rel=1e-4)
    assert divergence(base, model.merge_and_unload(), texts()) == pytest.approx(pairs[chosen], rel=1e-4)


def test_a_model_without_a_head_is_judged_by_its_hidden_states():
    base = LlamaModel(deep().config).eval()
    base.load_state_dict(deep().model.state_dict())
    errors = {}
    for n in (1, 2, 3):
        other = empty(base, [n], "layers")
        with torch.no_grad():
            errors[n] = sum(
                float(((base(**b)[0] - other(**b)[0]).square().sum(-1) * b["attention_mask"]).sum()) for b in texts()
            )
    assert gone(adapter(copy.deepcopy(base), 3, texts())[0]) == [min(errors, key=errors.get)]


def test_only_some_examples_decide():
    seen = []
    model = get_peft_model(deep(), StructuredPruningConfig(keep_layers=3, keep_ratio=1.0, layer_samples=2))  # influence
    embeddings = model.get_base_model().model.embed_tokens
    embeddings.register_forward_hook(lambda m, args, output: seen.append(args[0]))
    calibrate(model, texts())
    assert all(torch.equal(ids, texts()[0]["input_ids"]) for ids in seen)


# ------------------------------------------------------------------ with heads and neurons


@pytest.mark.parametrize("criterion", ["loss", "magnitude", "similarity"])
def test_heads_and_neurons_meet_the_rest_of_the_budget(criterion, tmp_path):
    data = texts()
    model, shares = adapter(deep(), 3, data, keep_ratio=0.6, criterion=criterion, value_dtype="float32")
    largest = max(unit_macs(model, site, 10) for site in find_sites(model)) / model_size(deep(), 10).macs
    assert 0.6 - largest <= shares["flops"] <= 0.6 + 1e-9
    (removed,) = gone(model)
    for layer in pruning_layers(model):
        whole = f".{removed}." in layer.module_name
        assert whole or bool(layer.get_mask("default").any())
        assert not (whole and layer.changes_weights("default"))
    masked = logits(model, data[0])
    model.save_pretrained(tmp_path)
    shorter = PeftModel.from_pretrained(deep(), tmp_path).merge_and_unload()
    torch.testing.assert_close(logits(shorter, data[0]), masked, atol=1e-5, rtol=1e-5)
    save_compact(shorter, tmp_path / "compact")
    loaded = load_compact(tmp_path / "compact")
    torch.testing.assert_close(logits(loaded, data[0]), masked, atol=1e-5, rtol=1e-5)
    assert loaded.config.num_hidden_layers == 3
    assert json.loads(json.dumps(loaded.config.peft_prune_structure))["layers"]["units"] == 4


@pytest.mark.parametrize("keep_ratio", [0.6, 1.0])
def test_shorter_models_are_ordinary_checkpoints(keep_ratio, tmp_path):
    fields = {"keep_ratio": keep_ratio, "shapes": "uniform", "value_dtype": "float32"}
    model, shares = adapter(deep(), 3, texts(), **fields)
    assert shares["flops"] == pytest.approx(min(0.75, keep_ratio), abs=0.05)
    masked = logits(model, texts()[0])
    save_standard(model.merge_and_unload(), tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert loaded.config.num_hidden_layers == 3
    torch.testing.assert_close(logits(loaded, texts()[0]), masked, atol=1e-5, rtol=1e-5)


def test_layers_that_meet_the_budget_leave_the_rest_alone():
    model, shares = adapter(deep(), 2, texts(), keep_ratio=0.8)
    assert shares["flops"] == 0.5
    masks = [layer.get_mask("default") for layer in pruning_layers(model)]
    assert sum(bool(mask.all()) for mask in masks) == sum(not bool(mask.any()) for mask in masks) == 4


def test_all_layers_may_stay():
    model, shares = adapter(deep(), 4, texts())
    assert shares["flops"] == 1.0 and gone(model) == []
    assert torch.equal(logits(model, texts()[0]), logits(deep(), texts()[0]))


def test_one_layer_may_be_all_that_stays():
    model, _ = adapter(deep(), 1, texts())
    assert gone(model) == [1, 2, 3]
    masked = logits(model, texts()[0])
    torch.testing.assert_close(logits(model.merge_and_unload(), texts()[0]), masked, atol=1e-5, rtol=1e-5)


# ------------------------------------------------------------------ models that are shorter already


def test_records_of_units_move_with_their_layers(tmp_path):
    model, data = deep(), texts()
    with torch.no_grad():
        model.model.layers[3].mlp.down_proj.weight[:, 5:] = 0
        model.model.layers[1].mlp.down_proj.weight[:, :7] = 0
    shrink(model)
    shrink(empty_in_place(model, 1))
    shrink(empty_in_place(model, 1))  # which was the third
    assert set(model.config.peft_prune_structure) == {"layers", "layers.1.mlp.down_proj"}
    assert model.config.peft_prune_structure["layers"] == {"units": 4, "kept": "09"}
    expected = logits(model, data[0])
    save_compact(model, tmp_path)
    torch.testing.assert_close(logits(load_compact(tmp_path), data[0]), expected)
    backbone = load_compact(tmp_path, model_class=LlamaModel)
    assert len(backbone.layers) == 2


def empty_in_place(model, number):
    with torch.no_grad():
        model.model.layers[number].self_attn.o_proj.weight.zero_()
        model.model.layers[number].mlp.down_proj.weight.zero_()
    return model


def test_a_first_block_and_post_norms_keep_a_unit():
    first = shrink(empty_in_place(deep(), 0))
    assert len(first.model.layers) == 4 and first.model.layers[0].mlp.down_proj.in_features == 1
    bert = make_bert()
    with torch.no_grad():
        bert.bert.encoder.layer[1].attention.output.dense.weight.zero_()
        bert.bert.encoder.layer[1].output.dense.weight.zero_()
    before = logits(bert, texts()[0])
    assert len(shrink(bert).bert.encoder.layer) == 2
    torch.testing.assert_close(logits(bert, texts()[0]), before, atol=1e-5, rtol=1e-5)


def test_a_record_of_other_layers_is_told(tmp_path):
    save_compact(shrink(empty_in_place(deep(), 2)), tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["peft_prune_structure"]["layers"]["kept"] = "03"
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="the record is of 2 kept layers at 'layers', which has 3"):
        load_compact(tmp_path, check_tensors=False)


# ------------------------------------------------------------------ errors

BAD = [
    ({"keep_layers": 0}, "keep_layers=0 must be a whole number, at least 1"),
    ({"keep_layers": -1}, "keep_layers=-1"),
    ({"keep_layers": 2.0}, "keep_layers=2.0 must be a whole number"),
    ({"keep_layers": "2"}, "keep_layers='2' must be a whole number"),
    ({"keep_layers": True}, "keep_layers=True must be a whole number"),
    ({"layer_criterion": "random"}, "layer_criterion='random' is unknown. Use one of 'influence', 'loss'"),
    ({"layer_samples": 0}, "layer_samples=0"),
]


@pytest.mark.parametrize(("fields", "message"), BAD, ids=[str(fields) for fields, _ in BAD])
def test_bad_fields_are_told(fields, message):
    with pytest.raises(ValueError, match=message):
        StructuredPruningConfig(**fields)


@pytest.mark.parametrize(
    ("base", "message"),
    [
        (lambda: make("bert"), r"BertForSequence.*post-norm.*Leave keep_layers out"),
        (lambda: make("albert"), "its layers share one block"),
        (lambda: make("t5"), "it has several stacks of blocks"),
        (
            lambda: OPTForCausalLM(OPTConfig(**_OPT, do_layer_norm_before=False)),
            "OPTForCausalLM.*behind attention and feed-forward",
        ),
        (
            lambda: GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=3, n_head=4, scale_attn_by_inverse_layer_idx=True)),
            "with scale_attn_by_inverse_layer_idx=True a layer computes something else at another place",
        ),
    ],
)
def test_models_that_need_every_layer_are_told(base, message):
    with pytest.raises(ValueError, match=message):
        get_peft_model(base(), StructuredPruningConfig(keep_layers=2))


_OPT = {"vocab_size": 90, "hidden_size": 32, "num_hidden_layers": 3, "ffn_dim": 48, "num_attention_heads": 4} | {
    "word_embed_proj_dim": 32, "max_position_embeddings": 64
}  # fmt: skip


def test_layers_that_are_not_there_are_told():
    with pytest.raises(ValueError, match="keep_layers=3 is more than the 2 layers of LlamaForCausalLM"):
        get_peft_model(make_llama(), StructuredPruningConfig(keep_layers=3))
    for where in ({"target_modules": ["down_proj"]}, {"layers_to_transform": [0]}):
        with pytest.raises(ValueError, match="keep_layers=1 removes 1 layers, but only 0 can be removed"):
            get_peft_model(make_llama(), StructuredPruningConfig(keep_layers=1, **where))
    with pytest.raises(ValueError, match=r"must be blocks, and not the first: model.layers.1"):
        remove_blocks(make_llama(), ["model.layers.0"])
    with pytest.raises(ValueError, match="needs batches"):
        config = StructuredPruningConfig(keep_layers=1, criterion="magnitude", repair=False)
        calibrate(get_peft_model(make_llama(), config))


def test_an_interrupted_choice_leaves_nothing_behind():
    config = StructuredPruningConfig(keep_layers=2, keep_ratio=1.0, layer_criterion="loss")
    model = get_peft_model(deep(), config)
    calls, last = [], model.get_base_model().model.layers[3]

    def interrupt(module, args, kwargs):
        calls.append(module)
        if len(calls) == 6:
            raise KeyboardInterrupt

    handle = last.register_forward_pre_hook(interrupt, with_kwargs=True)
    with pytest.raises(KeyboardInterrupt):
        calibrate(model, texts())
    handle.remove()
    assert not any("forward" in vars(block) for block in model.get_base_model().model.layers)
    with pytest.warns(UserWarning, match="not been calibrated"):
        assert torch.equal(logits(model, texts()[0]), logits(deep(), texts()[0]))
    calibrate(model, texts())
    assert len(gone(model)) == 2


def test_all_architectures_that_can_are_known():
    for name in ARCHITECTURES:
        model = make(name)
        try:
            found = len(find_stack(model).blocks) == 3
        except ValueError:
            found = False
        assert found == (name in PRENORM)
