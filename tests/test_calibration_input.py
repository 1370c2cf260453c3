"""Calibration data that does not fit, and models that cannot be calibrated as they are: told before work is lost."""

import warnings

import pytest
import torch
from helpers import architectures
from helpers.models import logits, make_bert, make_llama, make_mixture
from peft import get_peft_model
from torch import nn
from transformers import SwitchTransformersConfig, SwitchTransformersForConditionalGeneration

from peft_prune import DSEEConfig, PPruningConfig, SMPConfig, SparseGPTConfig, WandaConfig, calibrate
from peft_prune.calibration.checks import longest_text
from peft_prune.layers.layer import pruning_layers
from peft_prune.layers.quantized import PrunedQuantizedLinear


ONE_SHOT = [WandaConfig, SparseGPTConfig]


def ids(count, tokens, high=90):
    return torch.randint(3, high, (count, tokens), generator=torch.Generator().manual_seed(0))


def batch_for(name, count=2, tokens=9):
    """A batch with a decoder's side where there is one."""
    decoder = {"decoder_input_ids": ids(count, 5)} if name == "t5" else {}
    return {"input_ids": ids(count, tokens)} | decoder


def fails(name, batches, message, config=WandaConfig):
    """A calibration that fails before anything is run or changed."""
    model = get_peft_model(architectures.make(name), config())
    keys, ran = set(model.state_dict()), []
    for layer in pruning_layers(model):
        layer.register_forward_pre_hook(lambda module, args: ran.append(module))
    with pytest.raises(ValueError, match=message):
        calibrate(model, batches)
    assert set(model.state_dict()) == keys and not ran


TEXT_MODELS = ["llama", "bert", "gpt2", "t5"]


@pytest.mark.parametrize("config", ONE_SHOT)
@pytest.mark.parametrize("name", TEXT_MODELS)
def test_text_that_is_all_padding(name, config):
    batch = batch_for(name)
    message = "the examples contain padding only. Check attention_mask"
    fails(name, [batch | {"attention_mask": torch.zeros(2, 9, dtype=torch.int64)}], message, config)
    fails(name, [batch | {"input_ids": torch.zeros(2, 9, dtype=torch.int64)}], message, config)  # the pad token
    if name == "t5":
        fails(name, [batch | {"decoder_attention_mask": torch.zeros(2, 5, dtype=torch.int64)}], message, config)


@pytest.mark.parametrize("name", TEXT_MODELS)
def test_text_that_does_not_fit_the_model(name):
    batch = batch_for(name)
    fails(name, [batch, batch | {"input_ids": batch["input_ids"][0]}], r"shape \(9,\).*unsqueeze\(0\)")
    fails(name, [batch, batch | {"input_ids": batch["input_ids"][:, :0]}], r"shape \(2, 0\).*at least one token")
    fails(name, [batch, batch | {"input_ids": ids(2, 9) + 500}], "has the token 5.. in input_ids, .* 0 to 119")
    fails(
        name, [batch, batch | {"attention_mask": torch.ones(2, 8)}], r"attention_mask of shape \(2, 8\) for input_ids"
    )
    fails(name, [batch, batch | {"input_ids": ids(2, 9).float()}], r"input_ids of dtype torch.float32.*\.long\(\)")
    if name != "t5":  # positions are relative there
        fails(name, [batch, batch_for(name, tokens=65)], "has 65 tokens .* at most 64 .*max_length=64")


def test_packed_texts_are_as_long_as_the_longest_of_them():
    """As TRL packs: one row without padding, positions counted from 0 in each text."""
    model, packed = get_peft_model(architectures.make("llama"), WandaConfig()), ids(1, 100)
    fails("llama", [{"input_ids": packed, "position_ids": torch.arange(100)[None]}], "has 100 tokens .* at most 64")
    calibrate(model, [{"input_ids": packed, "position_ids": torch.arange(50).repeat(2)[None]}])
    assert all(layer.has_mask("default") for layer in pruning_layers(model))


@pytest.mark.parametrize("config", [*ONE_SHOT, PPruningConfig])
def test_batches_that_give_nothing(config):
    used_up = iter([batch_for("bert")])
    list(used_up)
    for batches in ([], used_up, [{"input_ids": ids(2, 9)[:0]}]):
        fails("bert", batches, "batches is empty, or a generator that is exhausted", config)


def test_images_of_another_size():
    model = get_peft_model(architectures.make("vit"), WandaConfig())
    with pytest.raises(ValueError, match="image size"):  # as Transformers says it
        calibrate(model, [{"pixel_values": torch.randn(2, 3, 24, 24)}])
    assert not any(layer.has_mask("default") for layer in pruning_layers(model))


@pytest.mark.parametrize(
    ("name", "tokens"),
    [
        ("roberta", 62),
        ("mpnet", 62),
        ("opt", 2048),
        ("gpt2", 64),
        ("bert", 64),
        ("llama", 64),
        ("t5", None),
        ("vit", None),
    ],
)
def test_the_longest_text_of_a_model(name, tokens):
    model = architectures.make(name)
    assert longest_text(model) == tokens
    if tokens and tokens < 100 and name != "llama":  # as many work, and one more does not
        logits(model, {"input_ids": ids(1, tokens)})
        with pytest.raises((IndexError, RuntimeError)):
            logits(model, {"input_ids": ids(1, tokens + 1)})


@pytest.mark.parametrize("name", TEXT_MODELS)
def test_batches_of_different_lengths_are_no_bad_input(name):
    """The same masks, one text a batch or all texts of a length together."""
    texts = [ids(1, tokens) for tokens in (9, 9, 17, 17, 17)]
    together = [torch.cat(texts[:2]), torch.cat(texts[2:])]
    masks = []
    for batches in (texts, together):
        model = get_peft_model(architectures.make(name), WandaConfig(num_samples=5))
        decoder = lambda x: {"decoder_input_ids": x[:, :7]} if name == "t5" else {}  # noqa: E731
        calibrate(model, [{"input_ids": x} | decoder(x) for x in batches])
        masks.append(torch.cat([layer.get_mask("default").flatten() for layer in pruning_layers(model)]))
    assert (masks[0] == masks[1]).float().mean() > 0.995


# --------------------------------------------------------------------- figures


def warned(config, batches, make=make_llama):
    model = get_peft_model(make(), config)
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        calibrate(model, batches)
    return [str(w.message) for w in found if str(w.message).startswith("calibrate")]


def test_fewer_examples_than_asked_for():
    (message,) = warned(WandaConfig(), [{"input_ids": ids(4, 20)}] * 2)
    assert "gave 8 examples, fewer than num_samples=128" in message and "num_samples=8 in the config" in message
    assert not warned(WandaConfig(num_samples=8), [{"input_ids": ids(4, 20)}] * 2)
    assert not warned(WandaConfig(num_samples=6), [{"input_ids": ids(4, 20)}] * 2)  # whole batches are taken


def test_fewer_tokens_than_inputs():
    batch = {"input_ids": ids(2, 20), "attention_mask": torch.ones(2, 20, dtype=torch.int64)}
    batch["attention_mask"][:, 18:] = 0
    for config in (SparseGPTConfig(num_samples=2), WandaConfig(num_samples=2)):
        (message,) = warned(config, [batch])  # 36 tokens are enough for 32 inputs, and every block is like the first
        assert "layers.0.mlp.down_proj' saw 36 tokens for 48 inputs; 48 are the least" in message
    assert not warned(WandaConfig(num_samples=2, refine=None), [batch])
    (message,) = warned(WandaConfig(num_samples=1, refine=None), [{"input_ids": ids(1, 20)}])
    assert "saw 20 tokens for 32 inputs; 32 are the least" in message


# ------------------------------------------------------- models that are not fit


@pytest.mark.parametrize("config", ONE_SHOT)
@pytest.mark.parametrize(("make", "place"), [(make_llama, "layers.1.mlp"), (make_bert, "layer.1.output.dense")])
def test_activations_that_are_not_finite(make, place, config):
    model = get_peft_model(make(), config(num_samples=2))

    def overflow(module, args):
        return (torch.full_like(args[0], float("inf")), *args[1:])

    target = next(m for name, m in model.named_modules() if name.endswith(place))
    target.register_forward_pre_hook(overflow)
    with pytest.raises(ValueError, match=rf"input of '.*{place}.*' is not finite.*float32 instead of float16"):
        calibrate(model, [{"input_ids": ids(2, 24)}])
    assert not any(layer.has_mask("default") for layer in pruning_layers(model))


@pytest.mark.parametrize("config", ONE_SHOT)
def test_a_base_that_is_calibrated_already(config):
    model = get_peft_model(make_llama(), config(num_samples=2))
    calibrate(model, [{"input_ids": ids(2, 24)}])
    with pytest.raises(ValueError, match="calibrated already. To choose again, add another adapter"):
        calibrate(model, [{"input_ids": ids(2, 24)}])


class Int8Tensor(nn.Parameter):
    """Looks like a weight of torchao."""

    __module__ = "torchao.stub"

    def dequantize(self):
        return torch.Tensor(self.data).float() * 0.5


def make_quantized():
    model = make_llama(num_hidden_layers=1)
    for module in model.model.layers.modules():
        if isinstance(module, nn.Linear):
            module.weight = Int8Tensor((module.weight.data * 64).round(), requires_grad=False)
    return model


@pytest.mark.parametrize("fields", [{}, {"refine": None}, {"update": "low_rank", "r": 4}, {"granularity": "2:4"}])
def test_quantised_bases_are_calibrated_on_what_their_weights_stand_for(fields):
    """Without the libraries; tests/test_quantized.py has these."""
    plain = make_quantized()
    for module in plain.model.layers.modules():
        if isinstance(module, nn.Linear):
            module.weight = nn.Parameter(module.weight.dequantize())
    masks = []
    for base in (make_quantized(), plain):
        model = get_peft_model(base, WandaConfig(num_samples=4, **fields))
        calibrate(model, [{"input_ids": ids(4, 24)}])
        masks.append([layer.get_mask("default") for layer in pruning_layers(model)])
        if base is not plain:
            assert all(isinstance(layer, PrunedQuantizedLinear) for layer in pruning_layers(model))
    assert all(torch.equal(one, two) for one, two in zip(*masks, strict=True))
    with pytest.raises(TypeError, match="its weight is quantised: torchao. Load the base model without"):
        get_peft_model(make_quantized(), SparseGPTConfig())


# ------------------------------------------------------------------ mixtures


@pytest.mark.parametrize("targets", [None, "all-linear"])
@pytest.mark.parametrize("config", [WandaConfig, SparseGPTConfig, SMPConfig])
@pytest.mark.parametrize("kind", ["Mixtral", "Qwen2Moe", "Qwen3Moe"])
def test_experts_that_are_parameters_are_refused_by_name(kind, config, targets):
    base = make_mixture(kind)
    blocks = {name: p for name, p in base.named_parameters() if ".layers." in name and p.dim() > 1}
    share = sum(p.numel() for name, p in blocks.items() if ".experts." in name) / sum(
        p.numel() for p in blocks.values()
    )
    with pytest.raises(ValueError) as error:
        get_peft_model(base, config(target_modules=targets))
    message = str(error.value)
    assert f"experts of {kind}ForCausalLM, {100 * share:.1f} % of the weights of its blocks" in message
    assert "(gate_up_proj, down_proj) of 'model.layers.0.mlp.experts' and its like, 2 in all" in message
    # the advice works, and says what it leaves
    named = eval(message.split("target_modules=")[-1].rstrip("."))
    with pytest.warns(UserWarning, match=rf"does not prune the experts of {kind}ForCausalLM, {100 * share:.1f} %"):
        model = get_peft_model(make_mixture(kind), config(target_modules=named))
    if config is not SMPConfig:
        assert calibrate(model, [{"input_ids": ids(4, 24)}])["sparsity"] == pytest.approx(0.5, abs=0.01)
    assert all(name in str(sorted(named)) for name in ("q_proj", "k_proj", "v_proj", "o_proj"))


def test_experts_are_what_dsee_prunes():
    fields = {"target_modules": ["q_proj"], "r": 2, "num_sparse": 3}
    with pytest.raises(ValueError, match=r"^prune_target_modules=None .* dense, name those: prune_target_modules=\["):
        get_peft_model(make_mixture(), DSEEConfig(**fields))
    with pytest.warns(UserWarning, match="does not prune the experts of MixtralForCausalLM"):
        get_peft_model(make_mixture(), DSEEConfig(**fields, prune_target_modules=["o_proj"]))


def make_switch():
    """A mixture whose experts are modules."""
    torch.manual_seed(0)
    config = SwitchTransformersConfig(
        vocab_size=90, d_model=16, d_kv=8, d_ff=24, num_layers=2, num_decoder_layers=2, num_heads=2, num_experts=2,
        num_sparse_encoder_layers=1, num_sparse_decoder_layers=1, expert_capacity=400, decoder_start_token_id=0,
        pad_token_id=0,
    )  # fmt: skip
    return SwitchTransformersForConditionalGeneration(config).eval()


def test_experts_that_are_modules_are_calibrated_on_the_tokens_that_they_saw():
    batches = [{"input_ids": ids(4, 24), "decoder_input_ids": ids(4, 20)}]
    targets = r"encoder\.block\.1\.layer\.1\.mlp\.experts\.expert_[01]\.wi"
    model = get_peft_model(make_switch(), WandaConfig(target_modules=targets, num_samples=4, refine=None))
    calibrate(model, batches)
    plain, layers = make_switch(), pruning_layers(model)
    assert len(layers) == 2
    seen = {layer.module_name: [] for layer in layers}
    for name, tokens in seen.items():
        plain.get_submodule(name).register_forward_pre_hook(lambda m, args, tokens=tokens: tokens.append(args[0]))
    with torch.no_grad():
        plain(**batches[0])
    for layer in layers:
        tokens = torch.cat([x.flatten(0, -2) for x in seen[layer.module_name]])
        assert 0 < len(tokens) < 96, "its own tokens, not all of the batch"
        scores = layer.matrix.detach().abs() * tokens.square().sum(0).sqrt()
        assert torch.equal(layer.get_mask("default"), scores >= scores.topk(8, dim=1).values[:, -1:])


def test_experts_that_saw_few_tokens_or_none():
    batches = [{"input_ids": ids(1, 24), "decoder_input_ids": ids(1, 2)}]
    model = get_peft_model(make_switch(), WandaConfig(num_samples=1))
    with (
        pytest.warns(UserWarning, match=r"expert_\d.w[io]' saw \d+ tokens for"),
        pytest.raises(ValueError, match=r"decoder.*experts.expert_\d.wi' was not called.*Give more batches"),
    ):
        calibrate(model, batches)
    padded = [batches[0] | {"attention_mask": (torch.arange(24) < 20).long()[None]}]
    with pytest.raises(ValueError, match=r"expert_0.wi' saw \d+ tokens where the batch has 24, so padding"):
        calibrate(model, padded)
