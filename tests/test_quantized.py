"""Quantised base models: the mask is put on what the weights stand for. Libraries that are not there are skipped."""

import warnings

import pytest
import torch
from helpers.methods import TRAINED, advance, config, effective
from helpers.models import logits, make_llama
from peft import PeftModel, get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from peft_prune import SMPConfig, calibrate, create_pruning_optimizer, finalize, update_schedule
from peft_prune.layers.layer import pruning_layers
from peft_prune.layers.quantized import PrunedQuantizedLinear
from peft_prune.quantization import dequantized_weight, quantization_of


KINDS = ("torchao", "bitsandbytes 4-bit", "bitsandbytes 8-bit")


def plain():
    """As wide as the blocks that bitsandbytes quantises, which its kernels for some CPUs ask for."""
    return make_llama(hidden_size=64, intermediate_size=128)


def make_quantized(kind, folder):
    base = plain()
    if kind == "torchao":
        quantization = pytest.importorskip("torchao.quantization")
        linear = lambda module, name: isinstance(module, nn.Linear) and name != "lm_head"  # noqa: E731
        quantization.quantize_(base, quantization.Int8WeightOnlyConfig(), filter_fn=linear)
        return base
    pytest.importorskip("bitsandbytes")
    base.save_pretrained(folder / "base")
    four = {"load_in_4bit": True, "bnb_4bit_compute_dtype": torch.float32}
    how = BitsAndBytesConfig(**four if "4" in kind else {"load_in_8bit": True})
    return AutoModelForCausalLM.from_pretrained(folder / "base", quantization_config=how, device_map="cpu").eval()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("method", TRAINED)
def test_trains_saves_and_loads(method, kind, tmp_path, batch):
    dense = logits(make_quantized(kind, tmp_path), batch)
    model = get_peft_model(make_quantized(kind, tmp_path), config(method, task_type="CAUSAL_LM"))
    layers = pruning_layers(model)
    assert all(isinstance(layer, PrunedQuantizedLinear) for layer in layers) and len(layers) == 14
    assert quantization_of(layers[0].get_base_layer()) == kind
    # before training: no mask yet, and a product with the dequantised weight
    assert (logits(model, batch) - dense).abs().max() < 0.1 * dense.std()
    advance(model, method)
    expected = logits(model, batch)

    # an independent model of floating point with what the layers say they multiply by
    reference = plain()
    with torch.no_grad():
        for layer in layers:
            reference.get_submodule(layer.module_name).weight.copy_(effective(layer))
    torch.testing.assert_close(logits(reference, batch), expected, atol=1e-4, rtol=1e-4)

    ids = batch["input_ids"]
    optimizer = create_pruning_optimizer(model, 1e-3)
    before = [p.detach().clone() for p in model.parameters() if p.requires_grad]
    model.train()(input_ids=ids, labels=ids).loss.backward()
    optimizer.step()
    moved = [
        not torch.equal(a, b) for a, b in zip(before, (p for p in model.parameters() if p.requires_grad), strict=True)
    ]
    assert moved and all(moved)
    update_schedule(model, 10, 10)
    finalize(model)
    expected = logits(model, batch)
    model.save_pretrained(tmp_path / "adapter")
    with pytest.warns(UserWarning, match="cannot be checked.*quantised"):
        loaded = PeftModel.from_pretrained(make_quantized(kind, tmp_path), tmp_path / "adapter")
    assert torch.equal(logits(loaded, batch), expected)
    with model.disable_adapter():
        assert torch.equal(logits(model, batch), dense)


@pytest.mark.parametrize("kind", KINDS)
def test_merging_is_refused_and_done_on_the_model_as_it_was(kind, tmp_path, batch):
    model = advance(get_peft_model(make_quantized(kind, tmp_path), SMPConfig(sparsity=0.6)), "smp")
    finalize(model)
    with pytest.raises(ValueError, match=rf"q_proj' is quantised \({kind}\).*load the base model without"):
        model.merge_and_unload()
    model.save_pretrained(tmp_path / "adapter")
    on_float = PeftModel.from_pretrained(plain(), tmp_path / "adapter")
    for one, two in zip(pruning_layers(model), pruning_layers(on_float), strict=True):
        assert torch.equal(one.get_mask("default"), two.get_mask("default"))
    masked = logits(on_float, batch)
    assert torch.equal(logits(on_float.merge_and_unload(), batch), masked)
    # the other way round: a mask made in floating point, on a quantised base
    finalize(advance(on_float := get_peft_model(plain(), SMPConfig(sparsity=0.6)), "smp"))
    on_float.save_pretrained(tmp_path / "other")
    again = PeftModel.from_pretrained(make_quantized(kind, tmp_path), tmp_path / "other")
    assert (logits(again, batch) - logits(on_float, batch)).abs().max() < logits(on_float, batch).std()


@pytest.mark.parametrize("kind", KINDS)
def test_wanda_of_quantised_models(kind, tmp_path, batch):
    dense = logits(make_quantized(kind, tmp_path), batch)
    model = get_peft_model(make_quantized(kind, tmp_path), config("wanda", task_type="CAUSAL_LM"))
    ids = torch.randint(3, 90, (8, 32), generator=torch.Generator().manual_seed(0))
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        calibrate(model, [{"input_ids": part} for part in ids.split(2)])
    expected = logits(model, batch)
    reference = plain()
    with torch.no_grad():
        for layer in pruning_layers(model):
            reference.get_submodule(layer.module_name).weight.copy_(effective(layer))
            assert layer.get_mask("default").float().mean() == 0.5
    torch.testing.assert_close(logits(reference, batch), expected, atol=1e-4, rtol=1e-4)
    model.save_pretrained(tmp_path / "adapter")
    loaded = PeftModel.from_pretrained(make_quantized(kind, tmp_path), tmp_path / "adapter")
    assert torch.equal(logits(loaded, batch), expected) and not torch.equal(expected, dense)
    with pytest.raises(ValueError, match=rf"quantised \({kind}\)"):
        model.merge_and_unload()


@pytest.mark.parametrize("kind", KINDS)
def test_weights_are_the_same_after_the_base_has_run(kind, tmp_path, batch):
    """On some CPUs bitsandbytes puts a weight's numbers into another order when it first computes with it."""
    base = make_quantized(kind, tmp_path)
    layers = [m for n, m in base.named_modules() if n.endswith("proj")]
    before = [dequantized_weight(layer).clone() for layer in layers]
    dense = logits(base, batch)
    for layer, weight in zip(layers, before, strict=True):
        torch.testing.assert_close(dequantized_weight(layer), weight, atol=1e-3, rtol=1e-2)
    assert torch.equal(logits(base, batch), dense)


@pytest.mark.parametrize("kind", KINDS)
def test_p_pruning_of_quantised_models_is_refused(kind, tmp_path):
    base = make_quantized(kind, tmp_path)
    with pytest.raises(TypeError, match=rf"quantised: {kind}. Load the base model without quantization_config"):
        get_peft_model(base, config("ppruning"))


class Int8Tensor(nn.Parameter):
    """Looks like a weight of torchao, and counts how often it is dequantised."""

    __module__ = "torchao.stub"

    def dequantize(self):
        return torch.Tensor(self.data) * 0.5


def test_the_dequantised_weight_is_what_is_masked():
    """Without any of the libraries."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(8, 6))
    net[0].weight = Int8Tensor(net[0].weight.data, requires_grad=False)
    weight, bias, x = net[0].weight.dequantize(), net[0].bias.detach(), torch.randn(3, 8)
    model = advance(get_peft_model(net, SMPConfig(target_modules=["0"], sparsity=0.5)), "smp")
    (layer,) = pruning_layers(model)
    mask = layer.get_mask("default")
    assert torch.equal(mask, weight.abs() >= weight.abs().flatten().topk(24).values[-1])
    torch.testing.assert_close(model(x), x @ (weight * mask).T + bias)
    # dtype of the input, whatever that of the weight
    assert model.eval().double()(x.double()).dtype == torch.float64


class QLinear(nn.Linear):
    __module__ = "optimum.quanto.nn"

    def forward(self, x):
        return super().forward(x)


def packed(**buffers):
    module = nn.Module()
    for name, tensor in buffers.items():
        module.register_buffer(name, tensor)
    return module


OTHERS = {
    "HQQ": lambda: packed(W_q=torch.zeros(4)),
    r"Module \(GPTQ, AWQ\)": lambda: packed(qweight=torch.zeros(4)),
    "quanto": lambda: QLinear(4, 4),
    "torch.float8_e4m3fn": lambda: packed(weight=torch.zeros(4, 4).to(torch.float8_e4m3fn)),
    "torch.int8": lambda: packed(weight=torch.zeros(4, 4, dtype=torch.int8)),
}


@pytest.mark.parametrize("name", OTHERS)
def test_other_quantisations_are_refused_by_name(name):
    net = nn.ModuleDict({"layers": nn.ModuleList([nn.ModuleDict({"lin": OTHERS[name]()})])})
    with pytest.raises(
        TypeError, match=rf"'layers.0.lin'.*quantised: {name}.*Supported are quantised weights of bitsandbytes 4-bit"
    ):
        get_peft_model(net, SMPConfig(target_modules=["lin"]))
