"""How much predictions depend on layers' outputs: against all labels at once, and against the KL divergence itself."""

import math

import pytest
import torch
from helpers import architectures
from helpers.models import make_bert, make_llama
from peft import LoraConfig, get_peft_model
from transformers import BertForTokenClassification

from peft_prune.calibration import sensitivity as sensing
from peft_prune.calibration.sensitivity import output_sensitivity
from peft_prune.structure.sites import find_sites


def watched_of(model):
    return {site.output: (model.get_submodule(site.output), site.decoder) for site in find_sites(model)}


def text(padded=True):
    ids = torch.randint(3, 90, (2, 7), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[1, 5:] = 0 if padded else 1
    return [{"input_ids": ids, "attention_mask": mask}]


def noise_at(model, path, noise):
    return model.get_submodule(path).register_forward_hook(lambda module, args, out: out + noise)


def drawn_often(model, batches, draws):
    watched, sums = watched_of(model), {}
    for seed in range(draws):
        for key, value in output_sensitivity(model, watched, batches, 100, seed).items():
            sums[key] = sums.get(key, 0.0) + value / draws
    return sums


def test_it_is_the_expectation_over_all_labels():
    torch.manual_seed(0)
    model, batches = BertForTokenClassification(make_bert().config).eval(), text()
    found = drawn_often(model, batches, 200)
    for path, (layer, _) in watched_of(model).items():
        wanted = 0.0
        for i, tokens in enumerate((7, 5)):
            one = {key: value[i : i + 1] for key, value in batches[0].items()}
            noise = torch.zeros(1, 7, layer.weight.shape[0], requires_grad=True)
            handle = noise_at(model, path, noise)
            scores = model(**one).logits.log_softmax(-1)[0, :tokens]
            handle.remove()
            for score in scores.flatten():
                (gradient,) = torch.autograd.grad(score, noise, retain_graph=True)
                wanted += float(score.detach().exp() * gradient.square().sum()) / noise.shape[-1] / 2
        assert found[path] == pytest.approx(wanted, rel=0.25), path


@pytest.mark.parametrize("wrapped", [False, True])
def test_a_head_of_the_whole_sequence_does_not_count(wrapped):
    model, batches = make_bert().eval(), text()
    body = {key.removeprefix("bert."): layer for key, layer in watched_of(model).items()}
    expected = output_sensitivity(model.bert, body, batches, 100)
    watched = watched_of(model)
    asked = get_peft_model(model, LoraConfig(task_type="SEQ_CLS", target_modules=["query"])) if wrapped else model
    torch.nn.init.normal_(model.classifier.weight)
    found = output_sensitivity(asked, watched, batches, 100)
    assert {key.removeprefix("bert."): value for key, value in found.items()} == pytest.approx(expected)


def test_noise_on_an_output_changes_predictions_by_half_of_it():
    model, batches = make_llama().eval(), text(padded=False)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.data.mul_(3)
    found = drawn_often(model, batches, 30)
    generator, size = torch.Generator().manual_seed(0), 1e-2
    with torch.no_grad():
        before = model(**batches[0]).logits.double().log_softmax(-1)
        for path, (layer, _) in watched_of(model).items():
            divergence = 0.0
            for _ in range(60):
                noise = size * torch.randn(2, 7, layer.weight.shape[0], generator=generator)
                handle = noise_at(model, path, noise)
                after = model(**batches[0]).logits.double().log_softmax(-1)
                handle.remove()
                divergence += float((before.exp() * (before - after)).sum()) / 2 / 60
            wanted = 0.5 * size**2 * found[path] * layer.weight.shape[0]
            assert divergence == pytest.approx(wanted, rel=0.3), path


@pytest.mark.parametrize("name", sorted(architectures.ARCHITECTURES))
def test_every_architecture(name):
    model = architectures.make(name)
    found = output_sensitivity(model, watched_of(model), architectures.batches(name), 4)
    assert found.keys() == watched_of(model).keys()
    assert all(math.isfinite(value) and value > 0 for value in found.values()), found
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not any(module._forward_hooks for module in model.modules())


def test_padding_and_the_size_of_batches_do_not_count():
    model = make_bert().eval()
    one = text()[0]
    other = one | {"input_ids": one["input_ids"].masked_fill(one["attention_mask"] == 0, 77)}
    split = [{key: value[i : i + 1] for key, value in one.items()} for i in range(2)]
    expected = output_sensitivity(model, watched_of(model), [one], 100)
    for batches in ([other], split):
        assert output_sensitivity(model, watched_of(model), batches, 100) == pytest.approx(expected, rel=1e-5)


def test_a_model_without_predictions_is_asked_for_its_states():
    model = make_bert().base_model.eval()
    found = output_sensitivity(model, watched_of(model), text(), 100)
    assert all(value > 0 for value in found.values())


def test_it_ends_when_enough_tokens_were_seen(monkeypatch):
    monkeypatch.setattr(sensing, "TOKENS", 20)
    read = []

    def stream():
        for batch in 5 * text():
            read.append(batch)
            yield batch

    model = make_bert()
    output_sensitivity(model, watched_of(model), stream(), 100)
    assert len(read) == 2  # of 12 tokens each
    with pytest.raises(ValueError, match="batches is empty"):
        output_sensitivity(model, watched_of(model), [], 100)
