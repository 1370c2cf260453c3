"""Tensors that a layer keeps: usable wherever they were made."""

import copy
import io

import pytest
import torch
from helpers.models import logits, make_bert, make_masked_lm
from peft import get_peft_model

from peft_prune import MovementPruningConfig, SMPConfig, finalize, update_schedule
from peft_prune.layers.layer import pruning_layers


VERBALIZER = {"task": "SEQ_CLS", "words": ["a", "b"], "token_ids": [5, 9], "mask_token_id": 3}


def test_a_model_made_in_inference_mode_answers_there(batch):
    with torch.inference_mode():
        model = get_peft_model(make_bert(), SMPConfig(sparsity=0.5)).eval()
        found = model(input_ids=batch["input_ids"]).logits
    expected = logits(get_peft_model(make_bert(), SMPConfig(sparsity=0.5)), batch)
    assert torch.equal(found.clone(), expected)


def test_training_goes_on_after_inference_mode(batch):
    model = get_peft_model(make_bert(), SMPConfig(sparsity=0.5)).eval()
    with torch.inference_mode():
        model(input_ids=batch["input_ids"])
    model.train()(**batch).loss.backward()
    assert all(bool(layer.scores["default"].grad.any()) for layer in pruning_layers(model))


def test_inputs_get_gradients_through_values_that_inference_mode_decoded(batch):
    model = get_peft_model(make_bert(), MovementPruningConfig(variant="magnitude", sparsity=0.5))
    update_schedule(model, 1, total_steps=1)
    finalize(model)
    with torch.inference_mode():
        model.eval()(input_ids=batch["input_ids"])
    embedded = model.get_input_embeddings()(batch["input_ids"]).detach().requires_grad_()
    model(inputs_embeds=embedded).logits.sum().backward()
    assert embedded.grad.abs().sum() > 0


def test_values_follow_the_model_to_another_device():
    model = get_peft_model(torch.nn.Sequential(torch.nn.Linear(8, 8)), MovementPruningConfig(
        variant="magnitude", sparsity=0.5, target_modules=["0"]
    ))  # fmt: skip
    update_schedule(model, 1, total_steps=1)
    finalize(model)
    (layer,) = pruning_layers(model)
    host = layer.host["default"]
    before = layer.adapted("default", layer.matrix)
    host.values = host.values.to("meta")  # as if the model had come from there
    assert torch.equal(layer.adapted("default", layer.matrix), before) and host.values.device.type == "cpu"


def test_unmerging_follows_the_model_to_another_dtype_and_device():
    model = get_peft_model(torch.nn.Sequential(torch.nn.Linear(8, 8)), SMPConfig(sparsity=0.5, target_modules=["0"]))
    update_schedule(model, 4, total_steps=4)
    model.merge_adapter()
    model.to("meta")
    model.unmerge_adapter()
    assert not pruning_layers(model)[0].merged


@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
def test_copies_of_a_model_with_label_words_read_them(how, batch):
    model = get_peft_model(make_masked_lm(), SMPConfig(sparsity=0.5, verbalizer=VERBALIZER))
    expected = logits(model, batch)
    if how == "deepcopy":
        other = copy.deepcopy(model)
    else:
        torch.save(model, file := io.BytesIO())
        file.seek(0)
        other = torch.load(file, weights_only=False)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert torch.equal(logits(other, batch), expected) and expected.shape == (4, 2)


def test_label_words_of_adapters_in_different_layers(batch):
    model = get_peft_model(make_masked_lm(), SMPConfig(verbalizer=VERBALIZER, layers_to_transform=[0]), "a")
    model.add_adapter("b", SMPConfig(verbalizer=VERBALIZER, layers_to_transform=[1]))
    model.set_adapter("b")
    assert logits(model, batch).shape == (4, 2)


def test_label_words_of_adapters_in_one_batch(batch):
    other = VERBALIZER | {"words": ["c", "d"], "token_ids": [15, 19]}
    model = get_peft_model(make_masked_lm(), SMPConfig(verbalizer=VERBALIZER), "a")
    model.add_adapter("b", SMPConfig(verbalizer=other))
    model.eval()
    with pytest.raises(ValueError, match="different label words"):
        model(input_ids=batch["input_ids"], adapter_names=["a", "b", "a", "b"])
    with torch.no_grad():
        found = model(input_ids=batch["input_ids"], adapter_names=["b"] * 4).logits
    model.set_adapter("b")
    torch.testing.assert_close(found, logits(model, batch))
