"""Many masks on one backbone: what they cost, switching, mixed batches, combinations."""

import warnings
from dataclasses import replace

import pytest
import torch
from helpers.methods import final_adapter, randomize_scores
from helpers.models import BERT_TARGET_WEIGHTS, logits, make_bert, make_gpt2, make_llama
from peft import PeftModel, get_peft_model

from peft_prune import DSEEConfig, MovementPruningConfig, SMPConfig, finalize, update_schedule
from peft_prune.layers.layer import pruning_layers


def with_masks(base, names, at=0.6, **fields):
    """One backbone with final random masks."""
    model = None
    for seed, name in enumerate(names):
        config = SMPConfig(**{"sparsity": at, "preset": "encoder"} | fields)
        if model is None:
            model = get_peft_model(base, config, adapter_name=name)
        else:
            model.add_adapter(name, config)
        model.set_adapter(name)
        randomize_scores(model, seed, name)
        update_schedule(model, 10, 10)
        finalize(model)
    return model.eval()


def each(model, names, call):
    results = []
    for name in names:
        if name == "__base__":
            with model.disable_adapter():
                results.append(call(model))
        else:
            model.set_adapter(name)
            results.append(call(model))
    return results


def test_a_hundred_adapters_cost_what_is_stored(tmp_path, batch):
    final_adapter(tmp_path, at=0.9)
    model = PeftModel.from_pretrained(make_bert(), tmp_path, adapter_name="m0")
    for i in range(1, 100):
        model.load_adapter(tmp_path, f"m{i}")
    expected = logits(model, batch)
    model.set_adapter("m57")
    assert torch.equal(logits(model, batch), expected)
    layers = pruning_layers(model)
    buffers = sum(b.numel() * b.element_size() for m in layers for b in m.mask.buffers())
    stored = sum(entry["bytes"] for entry in model.peft_config["m0"].mask_info.values())
    assert buffers == 100 * stored
    # decoded, to a bit a weight, are the masks in use, and no more
    unpacked = [{name: host.unpacked[2] for name, host in m.host.items() if host.unpacked} for m in layers]
    assert all(set(bits) == {"m57"} for bits in unpacked)
    assert sum(bits["m57"].nbytes for bits in unpacked) == BERT_TARGET_WEIGHTS // 8
    assert sum(p.numel() for m in layers for p in m.scores.parameters()) == 0


@pytest.mark.parametrize("make", [make_bert, make_gpt2])
def test_each_sample_its_own_mask(make, batch):
    names = ["a", "b", "__base__", "a"]
    model = with_masks(make(), ["a", "b", "c"])
    ids = batch["input_ids"]
    with torch.no_grad():
        alone = [
            each(model, [name], lambda m, i=i: m(input_ids=ids[i : i + 1]).logits)[0] for i, name in enumerate(names)
        ]
        model.set_adapter("c")
        mixed = model(input_ids=ids, adapter_names=names).logits
        torch.testing.assert_close(mixed, torch.cat(alone))
        # and nothing of it stays behind
        assert torch.equal(model(input_ids=ids).logits, each(model, ["c"], lambda m: m(input_ids=ids).logits)[0])


def test_heads_follow_the_sample(batch):
    model = with_masks(make_bert(), ["a", "b"], task_type="SEQ_CLS")
    with torch.no_grad():
        model.base_model.model.classifier.modules_to_save["b"].weight.mul_(5)
        mixed = model(input_ids=batch["input_ids"], adapter_names=["a", "b", "a", "b"]).logits
        a, b = each(model, ["a", "b"], lambda m: m(input_ids=batch["input_ids"]).logits)
    torch.testing.assert_close(mixed, torch.stack([a[0], b[1], a[2], b[3]]))


@pytest.mark.parametrize("num_beams", [1, 3])
def test_generate_with_and_without_beams(num_beams):
    model = with_masks(make_llama(), ["a", "b"], at=0.5, task_type="CAUSAL_LM")
    ids = torch.randint(1, 90, (2, 4))
    settings = {"max_new_tokens": 6, "num_beams": num_beams, "do_sample": False, "pad_token_id": 0, "eos_token_id": -1}
    mixed = model.generate(input_ids=ids, adapter_names=["b", "a"], **settings)
    b, a = each(model, ["b", "a"], lambda m: m.generate(input_ids=ids, **settings))
    assert torch.equal(mixed, torch.stack([b[0], a[1]]))


def test_mixed_batches_told_apart_from_mistakes(batch):
    model = with_masks(make_bert(), ["a", "b"])
    ids = batch["input_ids"]
    with pytest.raises(ValueError, match=r"unknown adapters \['x'\]. Loaded are \['__base__', 'a', 'b'\]"):
        model(input_ids=ids, adapter_names=["a", "x", "b", "a"])
    with pytest.raises(ValueError, match="but got 3 and 4 respectively"):
        model(input_ids=ids, adapter_names=["a", "b", "a"])
    model.merge_adapter()
    with pytest.raises(ValueError, match="unmerge_adapter"):
        model(input_ids=ids, adapter_names=["a", "b", "a", "b"])
    model.unmerge_adapter()
    with pytest.raises(ValueError, match="inference only"):
        model.train()(input_ids=ids, adapter_names=["a", "b", "a", "b"])


@pytest.mark.parametrize(
    ("how", "weights", "rule"),
    [
        ("union", None, lambda a, b, c: a | b | c),
        ("intersection", None, lambda a, b, c: a & b & c),
        ("majority", None, lambda a, b, c: (a & b) | (a & c) | (b & c)),
        ("majority", [5.0, 1.0, 1.0], lambda a, b, c: a),
    ],
)
def test_combinations(tmp_path, batch, how, weights, rule):
    model = with_masks(make_bert(), ["a", "b", "c"], task_type="SEQ_CLS")
    with torch.no_grad():
        model.base_model.model.classifier.modules_to_save["a"].weight.mul_(3)
    model.add_weighted_adapter(["a", "b", "c"], weights, "new", combination_type=how)
    kept = 0
    for layer in pruning_layers(model):
        a, b, c, new = (layer.get_mask(name) for name in ("a", "b", "c", "new"))
        assert torch.equal(new, rule(a, b, c))
        kept += int(new.sum())
    size = sum(layer.shape[0] * layer.shape[1] for layer in pruning_layers(model))
    assert model.peft_config["new"].sparsity == pytest.approx(1 - kept / size)
    heads = model.base_model.model.classifier.modules_to_save
    assert torch.equal(heads["new"].weight, heads["a"].weight)

    model.set_adapter("new")
    expected = logits(model, batch)
    model.save_pretrained(tmp_path, selected_adapters=["new"])
    loaded = PeftModel.from_pretrained(make_bert(), tmp_path / "new")
    assert torch.equal(logits(loaded, batch), expected)


@pytest.mark.parametrize("how", ["union", "intersection", "majority"])
@pytest.mark.parametrize("weights", [[0.9, 0.1], [0.5, 0.5], None])
def test_weights_that_are_not_used_are_told(how, weights):
    model = with_masks(make_bert(), ["a", "b"])
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        model.add_weighted_adapter(["a", "b"], weights, "new", combination_type=how)
    told = [str(w.message) for w in warned if "have no effect" in str(w.message)]
    assert len(told) == (how != "majority" and weights == [0.9, 0.1])
    assert all('combination_type="majority"' in text and "[0.9, 0.1]" in text for text in told)


BAD = [
    ({"adapters": ["a"]}, "give at least two"),
    ({"adapters": ["a", "x"]}, "'x' is not loaded"),
    ({"adapters": ["a", "b"], "adapter_name": "a"}, "'a' exists already"),
    ({"adapters": ["a", "b"], "combination_type": "svd"}, "combination_type='svd'"),
    ({"adapters": ["a", "b"], "weights": [1.0]}, r"weights=\[1.0\] must be 2 non-negative numbers"),
    ({"adapters": ["a", "open"]}, "masks of 'open' are not final"),
    ({"adapters": ["a", "other"]}, "prune different modules"),
]


@pytest.mark.parametrize(("arguments", "message"), BAD, ids=[message for _, message in BAD])
def test_combinations_that_cannot_be_are_told(arguments, message):
    model = with_masks(make_bert(), ["a", "b"])
    model.add_adapter("other", SMPConfig(target_modules=["query"]))
    model.set_adapter("other")
    update_schedule(model, 10, 10)
    finalize(model)
    model.add_adapter("open", SMPConfig())
    before = set(model.peft_config)
    with pytest.raises(ValueError, match=message):
        model.add_weighted_adapter(**({"adapter_name": "new"} | arguments))
    assert set(model.peft_config) == before


@pytest.mark.parametrize(
    "config",
    [
        MovementPruningConfig(variant="l0", target_modules=["query"]),
        DSEEConfig(target_modules=["query"], num_sparse=4, lora_dropout=0.5, init_weights=False),
    ],
    ids=["l0", "dsee"],
)
def test_an_adapter_that_is_added_in_eval_mode_makes_no_noise(config, batch):
    model = get_peft_model(make_bert(), replace(config, target_modules=["value"])).eval()
    model.add_adapter("other", config)  # on layers of its own, and with DSEE on some that were there before
    model.set_adapter("other")
    added, first = (model(**batch).logits for _ in range(2))
    mixed = model(**batch, adapter_names=["other"] * len(first)).logits
    model.merge_adapter()
    assert torch.equal(added, first)
    torch.testing.assert_close(mixed, first)
    torch.testing.assert_close(model(**batch).logits, first)
