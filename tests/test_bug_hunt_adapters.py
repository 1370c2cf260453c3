"""Adapters by sample, merged, combined, named, loaded beside others: the right answer, or an error in time."""

import itertools
import logging
import warnings
from fractions import Fraction

import pytest
import torch
from helpers.methods import METHODS, OF_UNITS, adapter, advance, config
from helpers.models import logits, make_bert, make_gpt2, make_llama, make_masked_lm, snapshot
from helpers.verbalizer import IDS, POSITIONS, verbalizer
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import (
    BertConfig,
    BertForMultipleChoice,
    LEDConfig,
    LEDForConditionalGeneration,
    OPTConfig,
    OPTForCausalLM,
    SwitchTransformersConfig,
    SwitchTransformersForConditionalGeneration,
    XLNetConfig,
    XLNetForSequenceClassification,
)

from peft_prune import DSEEConfig, SMPConfig, finalize, update_schedule
from peft_prune.layers.layer import pruning_layers
from peft_prune.tuner.combine import combine_masks


def two_masks(base, targets=None, **fields):
    """Adapters a and b with random masks that differ."""
    torch.manual_seed(0)
    model = None
    for name in ("a", "b"):
        made = SMPConfig(sparsity=0.6, target_modules=targets, score_init="random", **fields)
        if model is None:
            model = get_peft_model(base, made, name)
        else:
            model.add_adapter(name, made)
        model.set_adapter(name)
        update_schedule(model, 1, 1)
        finalize(model)
    return model.eval()


def alone(model, name, **inputs):
    model.set_adapter(name)
    with torch.no_grad():
        return model(**inputs)[0]


def make_opt():
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "word_embed_proj_dim": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    return OPTForCausalLM(OPTConfig(vocab_size=90, ffn_dim=48, max_position_embeddings=32, dropout=0, **sizes)).eval()


# --------------------------------------------------------- 4: adapter_names shorter than the batch


@pytest.mark.parametrize("make", [make_bert, make_gpt2, make_llama, make_opt])
def test_4_fewer_names_than_samples_are_refused(make):
    model = two_masks(make())
    ids = torch.randint(2, 90, (4, 6))
    with torch.no_grad(), pytest.raises(ValueError, match="but got 2 and 4 respectively"):
        model(input_ids=ids, adapter_names=["a", "b"])
    with torch.no_grad(), pytest.raises(ValueError, match="but got 2 and 4 respectively"):
        model(ids, adapter_names=["a", "b"])


@pytest.mark.parametrize("tokens", [4, 8])  # as many as samples, and a multiple of that
def test_4_models_with_tokens_first_are_refused(tokens):
    torch.manual_seed(0)
    made = XLNetConfig(vocab_size=90, d_model=32, n_layer=2, n_head=4, d_inner=48, dropout=0)
    model = two_masks(XLNetForSequenceClassification(made).eval(), ["layer_1", "layer_2"], task_type="SEQ_CLS")
    ids = torch.randint(2, 90, (4, tokens))
    with torch.no_grad(), pytest.raises(ValueError, match="tokens first and samples second"):
        model(input_ids=ids, adapter_names=["a", "b", "b", "a"])
    # one adapter for all samples leaves nothing to mistake
    with torch.no_grad():
        found = model(input_ids=ids, adapter_names=["b"] * 4).logits
    torch.testing.assert_close(found, alone(model, "b", input_ids=ids), rtol=1e-4, atol=1e-5)


def test_4_attention_with_tokens_first_is_refused():
    torch.manual_seed(0)
    sizes = {"encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2, "decoder_attention_heads": 2}
    made = LEDConfig(vocab_size=90, d_model=16, encoder_ffn_dim=24, decoder_ffn_dim=24, attention_window=4, **sizes)
    model = two_masks(LEDForConditionalGeneration(made).eval(), ["longformer_self_attn.query"])
    ids = torch.randint(4, 90, (2, 8))
    with torch.no_grad(), pytest.raises(ValueError, match="tokens first and samples second"):
        model(input_ids=ids, decoder_input_ids=ids, adapter_names=["a", "b"])


def test_4_experts_are_refused():
    torch.manual_seed(0)
    made = SwitchTransformersConfig(
        vocab_size=90, d_model=16, d_kv=8, d_ff=24, num_layers=2, num_decoder_layers=2, num_heads=2, num_experts=2,
        num_sparse_encoder_layers=1, num_sparse_decoder_layers=1, decoder_start_token_id=0,
    )  # fmt: skip
    base = SwitchTransformersForConditionalGeneration(made).eval()
    if not any(".experts." in name and isinstance(m, torch.nn.Linear) for name, m in base.named_modules()):
        pytest.skip("experts are no modules in this version of Transformers")
    model = two_masks(base, r".*\.experts\..*\.wi")
    ids = torch.randint(2, 90, (2, 4))
    with torch.no_grad(), pytest.raises(ValueError, match="an expert sees tokens"):
        model(input_ids=ids, decoder_input_ids=ids, adapter_names=["a", "b"])


@pytest.mark.parametrize("tokens", [1, 4, 6])
def test_4_flattened_tokens_still_go_to_their_sample(tokens):
    model = two_masks(make_opt(), ["fc1", "fc2", "q_proj"])
    ids = torch.randint(2, 90, (4, tokens))
    names = ["b", "a", "a", "b"]
    with torch.no_grad():
        mixed = model(input_ids=ids, adapter_names=names).logits
    a, b = (alone(model, name, input_ids=ids) for name in "ab")
    torch.testing.assert_close(mixed, torch.stack([b[0], a[1], a[2], b[3]]), rtol=1e-4, atol=1e-5)


def test_4_choices_go_to_their_sample():
    torch.manual_seed(0)
    base = BertForMultipleChoice(BertConfig(vocab_size=90, hidden_size=32, num_hidden_layers=1, num_attention_heads=4,
                                            intermediate_size=48)).eval()  # fmt: skip
    model = two_masks(base)
    ids = torch.randint(2, 90, (2, 3, 5))
    with torch.no_grad():
        mixed = model(input_ids=ids, adapter_names=["b", "a"]).logits
    a, b = (alone(model, name, input_ids=ids) for name in "ab")
    torch.testing.assert_close(mixed, torch.stack([b[0], a[1]]))


@pytest.mark.parametrize("settings", [{"num_beams": 2}, {"num_beams": 2, "num_return_sequences": 2}])
def test_4_beams_go_to_their_sample(settings):
    model = two_masks(make_opt())
    ids = torch.randint(3, 90, (2, 4))
    settings = settings | {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 1, "eos_token_id": None}
    mixed = model.generate(input_ids=ids, adapter_names=["b", "a"], **settings)
    found = []
    for name, sample in (("b", 0), ("a", 1)):
        model.set_adapter(name)
        found.append(model.generate(input_ids=ids[sample : sample + 1], **settings))
    assert torch.equal(mixed, torch.cat(found))


# --------------------------------------------------------- 6: an adapter that is named, and not active, is merged


def moved_dsee():
    """Adapters a and b with updates that differ; a is active."""
    model = get_peft_model(make_bert(), DSEEConfig(r=2, num_sparse=3, sparsity=0.5, task_type="SEQ_CLS"), "a")
    model.add_adapter("b", DSEEConfig(r=2, num_sparse=3, sparsity=0.5, task_type="SEQ_CLS"))
    torch.manual_seed(2)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".dsee_B" in name or ".dsee_sparse" in name:
                parameter.normal_(0, 0.3 if name.endswith(".a") else 0.1)
            elif "classifier.modules_to_save.b" in name:
                parameter.normal_()
    for name in ("b", "a"):
        model.set_adapter(name)
        update_schedule(model, 4, 4)
    return model.eval()


def test_6_keep_sparse_is_for_the_adapter_that_is_merged(caplog, batch):
    model = moved_dsee()
    layers = {layer.module_name: layer for layer in pruning_layers(model)}
    masks = {name: layer.get_mask("b") for name, layer in layers.items()}
    whole = sum(float(layer.delta("b").square().sum()) for layer in layers.values())
    lost = sum(float(layer.delta("b")[~masks[name]].square().sum()) for name, layer in layers.items())
    configs = dict(model.peft_config)
    with caplog.at_level(logging.WARNING):
        merged = model.merge_and_unload(adapter_names=["b"], keep_sparse=True, inputs={"input_ids": batch["input_ids"]})
    assert all(bool((merged.get_submodule(name).weight[~mask] == 0).all()) for name, mask in masks.items())
    assert f"keep_sparse=True removed {(lost / whole) ** 0.5:.2%} of the norm" in caplog.text
    assert not any(config.keep_sparse for config in configs.values())


@pytest.mark.parametrize("method", METHODS)
def test_6_the_head_of_the_adapter_that_is_merged_comes_along(method, batch):
    model = get_peft_model(make_bert(), config(method, task_type="SEQ_CLS"), "a")
    model.add_adapter("b", config(method, task_type="SEQ_CLS"))
    with torch.no_grad():
        model.base_model.model.classifier.modules_to_save["b"].weight.mul_(5)
    for name in ("b", "a"):
        model.set_adapter(name)
        advance(model, method, name)
    model.set_adapter("b")
    expected = logits(model, batch)
    model.set_adapter("a")
    with pytest.raises(ValueError, match="'c' is not loaded. Loaded are"):
        model.merge_and_unload(adapter_names=["c"])
    merged = model.merge_and_unload(adapter_names=["b"], shrink=False)
    torch.testing.assert_close(logits(merged, batch), expected, rtol=1e-4, atol=1e-5)


# --------------------------------------------------------- 7: a LoRA on a loaded mask


def lora_on_mask(tmp_path, method, **lora):
    """A mask by Transformers' own method, and a LoRA that PEFT puts on it."""
    fields = {"target_modules": ["query", "value"]} if method not in OF_UNITS else {}
    adapter(make_bert(), method, **fields).save_pretrained(tmp_path)
    base = make_bert()
    base.load_adapter(str(tmp_path))
    settings = {"r": 2, "init_lora_weights": False, "target_modules": ["query", "key"]} | lora
    torch.manual_seed(1)
    return get_peft_model(base, LoraConfig(**settings), "lora").eval()


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("names", [None, ["lora"]])
@pytest.mark.parametrize("safe", [False, True])
def test_7_a_lora_on_a_mask_is_merged_as_it_is_computed(tmp_path, batch, method, names, safe):
    model = lora_on_mask(tmp_path, method)
    expected = logits(model, batch)
    weights = snapshot(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.merge_adapter(adapter_names=names, safe_merge=safe)
    torch.testing.assert_close(logits(model, batch), expected, rtol=1e-4, atol=1e-5)
    model.unmerge_adapter()
    torch.testing.assert_close(logits(model, batch), expected, rtol=1e-4, atol=1e-5)
    for key, value in snapshot(model).items():
        torch.testing.assert_close(value, weights[key], rtol=1e-4, atol=1e-5)
    merged = model.merge_and_unload(adapter_names=names, safe_merge=safe)
    assert not pruning_layers(merged)
    torch.testing.assert_close(logits(merged, batch), expected, rtol=1e-4, atol=1e-5)


def test_7_a_merge_that_fails_leaves_the_answers(tmp_path, batch):
    model = lora_on_mask(tmp_path, "smp")
    expected = logits(model, batch)
    layer = model.base_model.model.bert.encoder.layer[1].attention.self.key
    kept = layer.lora_B["lora"].weight.detach().clone()
    with torch.no_grad():
        layer.lora_B["lora"].weight.fill_(float("nan"))
    with pytest.raises(ValueError, match="NaNs"):
        model.merge_adapter(safe_merge=True)
    with torch.no_grad():
        layer.lora_B["lora"].weight.copy_(kept)
    torch.testing.assert_close(logits(model, batch), expected, rtol=1e-4, atol=1e-5)


# --------------------------------------------------------- 10: majority


def test_10_more_than_half_is_counted_exactly():
    grid = [0.05, 0.1, 0.2, 0.3, 0.4, 0.6, 0.7]
    patterns = torch.tensor(list(itertools.product([False, True], repeat=3)))
    for weights in itertools.product(grid, repeat=3):
        exact = [Fraction(repr(w)) for w in weights]
        expected = [
            sum(w for w, kept in zip(exact, row, strict=True) if kept) * 2 > sum(exact) for row in patterns.tolist()
        ]
        found = combine_masks(list(patterns.T), "majority", weights)
        assert found.tolist() == expected, weights


def test_10_votes_of_very_different_size_are_counted_exactly():
    masks = [torch.tensor([True, True, False]), torch.tensor([False, True, True]), torch.tensor([False, False, True])]
    assert combine_masks(masks, "majority", [1e20, 1e20, 1e-20]).tolist() == [False, True, True]


@pytest.mark.parametrize("weights", [[float("inf"), 1.0], [1.0, float("nan")]])
def test_10_votes_that_are_not_finite_are_refused(weights):
    model = two_masks(make_bert())
    with pytest.raises(ValueError, match="must be 2 non-negative numbers"):
        model.add_weighted_adapter(["a", "b"], weights, "c", "majority")


# --------------------------------------------------------- 18: label words after merging, and switched off


def test_18_a_merged_model_answers_with_label_words():
    model = get_peft_model(make_masked_lm(), SMPConfig(sparsity=0.5, verbalizer=verbalizer(), score_init="random"))
    update_schedule(model, 1, 1)
    finalize(model)
    model.eval()
    with torch.no_grad():
        expected = model(input_ids=IDS).logits
        with pytest.warns(UserWarning, match="save_pretrained"):
            merged = model.merge_and_unload()
        torch.testing.assert_close(merged(input_ids=IDS).logits, expected)
        assert merged(input_ids=IDS, labels=torch.tensor([0, 1, 1])).loss is not None
    assert expected.shape == (3, 2)


def test_18_label_words_that_are_merged_are_those_of_the_adapter_that_is():
    model = get_peft_model(make_masked_lm(), SMPConfig(verbalizer=verbalizer()), "a")
    model.add_adapter("b", SMPConfig(verbalizer=verbalizer() | {"token_ids": [5, 6, 7], "words": ["x", "y", "z"]}))
    with torch.no_grad(), pytest.warns(UserWarning, match="'x', 'y', 'z'"):
        assert model.eval().merge_and_unload(adapter_names=["b"])(input_ids=IDS).logits.shape == (3, 3)


def test_18_without_adapters_it_is_the_base_model():
    base = make_masked_lm()
    with torch.no_grad():
        full = base(input_ids=IDS).logits
        expected = torch.stack([full[i, position, [10, 11]] for i, position in enumerate(POSITIONS)])
        model = get_peft_model(base, SMPConfig(verbalizer=verbalizer(), sparsity=0.5)).eval()
        model.add_adapter("plain", SMPConfig())
        with model.disable_adapter():
            assert torch.equal(model(input_ids=IDS).logits, full)
        torch.testing.assert_close(model(input_ids=IDS).logits, expected)
        for name in ("__base__", "plain"):
            torch.testing.assert_close(model(input_ids=IDS, adapter_names=[name] * 3).logits, full)
        assert torch.equal(model.unload()(input_ids=IDS).logits, full)


# --------------------------------------------------------- 23: tasks with different numbers of labels


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("final", [True, False])
def test_23_a_task_with_other_labels_leaves_nothing_behind(tmp_path, batch, method, final):
    if method in OF_UNITS and not final:
        pytest.skip("P-pruning has no training checkpoints")
    for labels in (2, 3):
        made = adapter(make_bert(num_labels=labels), method, final, task_type="SEQ_CLS")
        made.save_pretrained(tmp_path / str(labels))
    model = PeftModel.from_pretrained(make_bert(num_labels=2), tmp_path / "2", adapter_name="two")
    before, expected = snapshot(model), logits(model, batch)
    with pytest.raises(ValueError, match=r"'three' has a 'classifier' of shape \(3, 32\).*num_labels.*label words"):
        model.load_adapter(tmp_path / "3", "three")
    assert set(model.peft_config) == {"two"} and set(snapshot(model)) == set(before)
    assert torch.equal(logits(model, batch), expected)
    model.load_adapter(tmp_path / "2", "three")  # the name is free
    assert set(model.peft_config) == {"two", "three"}


def test_23_the_only_adapter_is_refused_too(tmp_path):
    adapter(make_bert(num_labels=3), "smp", task_type="SEQ_CLS").save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="has a 'classifier'"):
        PeftModel.from_pretrained(make_bert(), tmp_path)


def test_23_a_failed_load_into_a_trained_adapter_keeps_it(tmp_path):
    adapter(make_bert(num_labels=3), "smp", task_type="SEQ_CLS").save_pretrained(tmp_path)
    model = adapter(make_bert(), "smp", final=False, task_type="SEQ_CLS")
    with pytest.raises(ValueError):
        model.load_adapter(tmp_path, "default")
    assert set(model.peft_config) == {"default"} and pruning_layers(model, "default")


# --------------------------------------------------------- 26: is_trainable on a final adapter


@pytest.mark.parametrize("variant", ["smp", "values", "ppruning", "dsee"])
def test_26_a_final_adapter_that_is_to_be_trained_is_told(tmp_path, variant):

    fields = {"variant": "magnitude"} if variant == "values" else {}
    method = "movement" if variant == "values" else variant
    adapter(make_bert(), method, **fields).save_pretrained(tmp_path)
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        PeftModel.from_pretrained(make_bert(), tmp_path)
        assert not [w for w in warned if "is_trainable" in str(w.message)]
        PeftModel.from_pretrained(make_bert(), tmp_path, is_trainable=True)
    told = [str(w.message) for w in warned if "is_trainable=True has no effect" in str(w.message)]
    assert len(told) == (variant != "dsee")  # DSEE's update can be trained on


# --------------------------------------------------------- 28: names of adapters


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", ["update", "values", "keys", "items", "pop", "clear", "training", "a.b", ""])
def test_28_names_that_torch_has_taken_are_refused(tmp_path, method, name):
    base = make_bert()
    before = snapshot(base)
    with pytest.raises(ValueError, match="adapter_name="):
        get_peft_model(base, config(method), adapter_name=name)
    assert set(snapshot(base)) == set(before)
    model = get_peft_model(base, config(method))
    kept = set(snapshot(model))
    with pytest.raises(ValueError, match="adapter_name="):
        model.add_adapter(name, config(method))
    assert set(model.peft_config) == {"default"} and set(snapshot(model)) == kept


def test_28_loading_under_such_a_name_is_refused(tmp_path):
    adapter(make_bert(), "smp").save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="adapter_name='update'"):
        PeftModel.from_pretrained(make_bert(), tmp_path, adapter_name="update")
    model = PeftModel.from_pretrained(make_bert(), tmp_path)
    with pytest.raises(ValueError, match="adapter_name='values'"):
        model.load_adapter(tmp_path, "values")
    by_transformers = make_bert()
    with pytest.raises(ValueError, match="adapter_name='items'"):
        by_transformers.load_adapter(str(tmp_path), adapter_name="items")
    assert not pruning_layers(by_transformers) and "items" not in getattr(by_transformers, "peft_config", {})
    assert set(snapshot(by_transformers)) == set(snapshot(make_bert()))
    pair = two_masks(make_bert())
    with pytest.raises(ValueError, match="adapter_name='pop'"):
        pair.add_weighted_adapter(["a", "b"], adapter_name="pop")
    assert set(pair.peft_config) == {"a", "b"}
