"""What docs/support.md says works, or is refused by name: layers, targets, and ways into PEFT, for every method."""

import copy
import re
import shutil
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from helpers.methods import CALIBRATED, METHODS, OF_UNITS, TRAINED, adapter, advance, config
from helpers.models import logits, make_bert, make_gpt2, make_llama
from helpers.versions import needs_adapters_of_transformers
from peft import (
    AutoPeftModelForSequenceClassification,
    LoraConfig,
    PeftModel,
    get_peft_model,
    inject_adapter_in_model,
)
from peft.utils.hotswap import hotswap_adapter
from torch import nn
from transformers import AutoModelForSequenceClassification

from peft_prune import MovementPruningConfig, SMPConfig, finalize, update_schedule
from peft_prune.layers.layer import pruning_layers


class Wrap(nn.Module):
    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x):
        return self.layer(x)


# ----------------------------------------------------------------------- layers

LAYERS = {
    "Conv1d": (lambda: nn.Conv1d(4, 6, 3, padding="same", padding_mode="circular"), (2, 4, 9)),
    "Conv2d": (lambda: nn.Conv2d(4, 6, 3, stride=2, groups=2, bias=False), (2, 4, 9, 9)),
    "Conv3d": (lambda: nn.Conv3d(4, 6, 2, dilation=2), (2, 4, 5, 5, 5)),
    "Embedding": (lambda: nn.Embedding(12, 6, padding_idx=0), None),
}


def made(kind):
    make, shape = LAYERS[kind]
    torch.manual_seed(0)
    return make(), torch.randint(0, 12, (2, 7)) if shape is None else torch.randn(shape)


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("method", ["smp", "movement"])
def test_convolutions_and_embeddings(method, kind, tmp_path):
    layer, x = made(kind)
    reference = copy.deepcopy(layer)
    model = get_peft_model(Wrap(layer), config(method, target_modules=["layer"]))
    (pruned,) = pruning_layers(model)
    torch.testing.assert_close(model(x), reference(x))
    assert type(pruned).__name__ == "Pruned" + kind and pruned.shape == reference.weight.flatten(1).shape
    advance(model, method)
    model.train()

    # straight through, written as a sum; the base layer itself computes with the weight
    scores = pruned.scores["default"].detach().clone().requires_grad_()
    mask = pruned.get_mask("default").float()
    matrix = reference.weight.detach().flatten(1)
    if method == "movement":
        matrix = matrix + pruned.update["default"].detach()
    weight = (matrix * (mask + scores - scores.detach())).view(reference.weight.shape)
    expected = torch.func.functional_call(reference, {"weight": weight}, (x,))
    target = torch.randn_like(expected)
    F.mse_loss(expected, target).backward()
    config_ = pruned.config("default")
    pruned.host["default"].penalty_armed = False
    F.mse_loss(model(x), target).backward()
    torch.testing.assert_close(model(x), expected)
    torch.testing.assert_close(pruned.scores["default"].grad, scores.grad)
    assert mask.mean() == pytest.approx(1 - config_.sparsity, abs=0.02)

    finalize(model)
    model.eval()
    torch.testing.assert_close(model(x), expected)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(Wrap(made(kind)[0]), tmp_path).eval()
    torch.testing.assert_close(loaded(x), expected)
    loaded.merge_adapter()
    torch.testing.assert_close(loaded(x), expected)
    loaded.unmerge_adapter()
    assert torch.equal(loaded.unload().layer.weight, reference.weight)


@pytest.mark.parametrize("granularity", ["row", "column", "2x3"])
def test_granularity_of_a_convolution_is_that_of_its_matrix(granularity):
    model = adapter(Wrap(nn.Conv2d(4, 6, 3)), "smp", target_modules=["layer"], granularity=granularity, sparsity=0.5)
    (layer,) = pruning_layers(model)
    mask = layer.get_mask("default")
    block = {"row": (1, 36), "column": (6, 1), "2x3": (2, 3)}[granularity]
    units = mask.view(6 // block[0], block[0], 36 // block[1], block[1]).float().mean((1, 3))
    assert set(units.flatten().tolist()) == {0.0, 1.0} and 0.4 <= units.mean() <= 0.6


def test_convolutions_are_no_default_targets():
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.lin = nn.Conv1d(4, 4, 1), nn.Linear(4, 4)

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.blocks = nn.ModuleList([Block(), Block()])

    model = get_peft_model(Net(), SMPConfig())
    model.add_adapter("conv", SMPConfig(target_modules=["conv", "lin"]))
    model.add_adapter("again", SMPConfig())
    assert [layer.module_name for layer in pruning_layers(model, "again")] == ["blocks.0.lin", "blocks.1.lin"]
    assert len(pruning_layers(model, "conv")) == 4


@pytest.mark.parametrize("method", ["smp", "movement"])
def test_an_embedding_comes_back(method, tmp_path, batch):
    model = adapter(make_llama(), method, target_modules=["embed_tokens", "lm_head"])
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(PeftModel.from_pretrained(make_llama(), tmp_path), batch), logits(model, batch))
    assert torch.equal(
        logits(model.merge_and_unload(), batch), logits(PeftModel.from_pretrained(make_llama(), tmp_path), batch)
    )


@pytest.mark.parametrize(
    ("method", "target"),
    [*((method, "lm_head") for method in (*TRAINED, "wanda")), ("smp", "wte"), ("movement", "wte")],
)
def test_tied_weights_are_used_but_not_merged(method, target, batch):
    base = make_gpt2()
    dense = logits(base, batch)
    model = adapter(base, method, target_modules=[target])
    assert not torch.allclose(logits(model, batch), dense)
    with pytest.raises(ValueError, match=f"{target}' shares its weight with .*tie_word_embeddings=False"):
        model.merge_and_unload()
    with model.disable_adapter():
        assert torch.equal(logits(model, batch), dense)


class Doubled(nn.Linear):
    """A linear layer with a `forward` of its own."""

    def forward(self, x):
        return 2 * super().forward(x)


def shared():
    net = nn.Sequential(Wrap(nn.Linear(4, 4)), Wrap(nn.Linear(4, 4)))
    net[1].layer = net[0].layer
    return net


UNFIT = {
    "MultiheadAttention": (lambda: Wrap(nn.MultiheadAttention(8, 2)), "layer", "hands its weights to a function"),
    "its out_proj": (lambda: Wrap(nn.MultiheadAttention(8, 2)), "out_proj", "MultiheadAttention reads its weight"),
    "TransformerEncoderLayer": (
        lambda: nn.Sequential(nn.TransformerEncoderLayer(8, 2, 16)),
        "linear1",
        "set_fastpath_enabled",
    ),
    "ConvTranspose2d": (lambda: Wrap(nn.ConvTranspose2d(4, 4, 3)), "layer", "ConvTranspose2d cannot be pruned"),
    "max_norm": (lambda: Wrap(nn.Embedding(9, 4, max_norm=1.0)), "layer", "max_norm"),
    "weight_norm": (
        lambda: Wrap(nn.utils.parametrizations.weight_norm(nn.Linear(4, 4))),
        "layer",
        "computed from other parameters",
    ),
    "forward": (
        lambda: Wrap(Doubled(4, 4)),
        "layer",
        "Doubled cannot be pruned.*do not override forward.*exclude_modules",
    ),
    "shared": (shared, "0.layer", r"shared by 2 modules \(Wrap, Wrap\)"),
}


@pytest.mark.parametrize("name", UNFIT)
@pytest.mark.parametrize("method", [*TRAINED, "wanda"])
def test_layers_that_would_ignore_a_mask_are_refused(method, name):
    make, target, message = UNFIT[name]
    base = make()
    with pytest.raises(TypeError, match=message):
        get_peft_model(base, config(method, target_modules=[target]))
    assert not pruning_layers(base)


@pytest.mark.parametrize("make", [lambda: nn.Conv2d(4, 4, 3), lambda: nn.Embedding(9, 4)])
@pytest.mark.parametrize("method", ["dsee", "wanda"])
def test_some_methods_prune_linear_layers_only(method, make):
    with pytest.raises(TypeError, match="cannot be pruned. Supported are torch's Linear, transformers's Conv1D"):
        get_peft_model(Wrap(make()), config(method, target_modules=["layer"]))


@pytest.mark.parametrize("target", ["word_embeddings", "attention.self.query"])
def test_p_pruning_wants_the_ends_of_heads_and_neurons(target):
    with pytest.raises((TypeError, ValueError), match="is not where heads or neurons end|cannot be pruned"):
        get_peft_model(make_bert(), config("ppruning", target_modules=[target]))


@pytest.mark.parametrize("method", TRAINED)
def test_the_fast_path_of_torch_can_be_switched_off(method):
    torch.manual_seed(0)
    base = nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 2, 32, batch_first=True), 1).eval()
    x = torch.randn(2, 5, 16)
    dense = base(x)
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        model = adapter(base, method, target_modules=["linear1", "linear2"])
        with torch.no_grad():
            pruned = model(x)
            assert not torch.allclose(pruned, dense)
            torch.testing.assert_close(model.merge_and_unload()(x), pruned)
    finally:
        torch.backends.mha.set_fastpath_enabled(True)


def test_models_that_read_weights_are_known():
    from transformers import JambaConfig
    from transformers.models.bloom.modeling_bloom import BloomMLP
    from transformers.models.jamba.modeling_jamba import JambaMambaMixer
    from transformers.models.llama.modeling_llama import LlamaAttention
    from transformers.models.t5.modeling_t5 import T5DenseActDense
    from transformers.models.wavlm.modeling_wavlm import WavLMAttention

    from peft_prune.tuner.weight_readers import children_read_by, reads_weight_of

    assert children_read_by(WavLMAttention) == {"q_proj", "k_proj", "v_proj", "out_proj"}
    # to look at a dtype is no use of a weight
    assert not children_read_by(T5DenseActDense) and not children_read_by(LlamaAttention)
    bloom = BloomMLP.__new__(BloomMLP)
    nn.Module.__init__(bloom)
    bloom.slow_but_exact = False
    assert not reads_weight_of(bloom, "dense_4h_to_h")
    bloom.slow_but_exact = True
    assert reads_weight_of(bloom, "dense_4h_to_h")

    # and are left out by default
    mixer = JambaMambaMixer(JambaConfig(hidden_size=16, intermediate_size=16, mamba_d_state=4, mamba_dt_rank=4), 0)
    model = get_peft_model(nn.ModuleDict({"layers": nn.ModuleList([mixer])}), SMPConfig())
    targets = {layer.module_name.rpartition(".")[2] for layer in pruning_layers(model)}
    assert "in_proj" in targets and not targets & {"dt_proj", "conv1d"}


# ---------------------------------------------------------------------- targets


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("make", [make_bert, make_gpt2])
def test_all_linear(method, make, batch):
    fields = {"target_modules": "all-linear", "task_type": "SEQ_CLS" if make is make_bert else "CAUSAL_LM"}
    model = adapter(make(), method, **fields)
    names = {layer.module_name for layer in pruning_layers(model)}
    linear = {name for name, m in make().named_modules() if type(m).__name__ in ("Linear", "Conv1D")}
    linear -= {"classifier", "lm_head"}
    assert names == linear if method not in OF_UNITS else len(names) == 4 and names < linear
    # and once more, beside the first
    model.add_adapter("two", config(method, **fields))
    assert {layer.module_name for layer in pruning_layers(model, "two")} >= names
    assert torch.isfinite(logits(model, batch)).all()


@pytest.mark.parametrize("method", METHODS)
def test_target_selection(method):
    def names(**fields):
        return [layer.module_name for layer in pruning_layers(adapter(make_bert(), method, **fields))]

    every = 4 if method in OF_UNITS else 12
    assert len(names()) == every
    assert len(names(layers_to_transform=[1])) == len(names(exclude_modules=r".*layer\.0\..*")) == every // 2
    assert len(names(layers_to_transform=1, layers_pattern="layer")) == every // 2
    assert len(names(exclude_modules=["attention.output.dense"])) == every - 2
    regex = names(target_modules=r".*layer\.1\.(attention\.)?output\.dense")
    assert regex == ["bert.encoder.layer.1.attention.output.dense", "bert.encoder.layer.1.output.dense"]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"target_modules": ["nothing"]}, "nothing.*not found|matches no module"),
        ({"layers_to_transform": [9]}, "not found.*layers_to_transform|matches no module"),
        ({"exclude_modules": ".*"}, "All modules were excluded|matches no module"),
        ({"target_parameters": ["experts.down_proj"]}, r"target_parameters=\['experts.down_proj'\] cannot be pruned"),
    ],
    ids=str,
)
def test_targets_that_match_nothing_are_told(method, fields, message):
    with pytest.raises(ValueError, match=message):
        get_peft_model(make_bert(), config(method, **fields))


# ---------------------------------------------------------- ways into PEFT and out


@needs_adapters_of_transformers
@pytest.mark.parametrize("method", METHODS)
def test_inject_and_transformers_own_methods(method, tmp_path, batch):
    base = make_bert()
    dense = logits(base, batch)
    injected = advance(inject_adapter_in_model(config(method), make_bert()), method)
    base.add_adapter(config(method), "a")
    a = logits(advance(base, method), batch)
    assert torch.equal(logits(injected, batch), a) and not torch.equal(a, dense)
    base.add_adapter(config(method), "b")
    base.set_adapter("a")
    assert torch.equal(logits(base, batch), a) and base.active_adapters() == ["a"]
    base.disable_adapters()
    assert torch.equal(logits(base, batch), dense)
    base.enable_adapters()
    if method in TRAINED:
        finalize(base)
    assert torch.equal(logits(base, batch), a)
    base.save_pretrained(tmp_path)
    again = make_bert()
    again.load_adapter(str(tmp_path))
    assert torch.equal(logits(again, batch), a)
    base.delete_adapter("a")
    assert all(layer._get_available_adapters() == {"b"} for layer in pruning_layers(base))


@pytest.mark.parametrize("final", [True, False])
@pytest.mark.parametrize("method", METHODS)
def test_loading_and_unloading(method, final, tmp_path, batch):
    make_bert().save_pretrained(tmp_path / "base")
    base = AutoModelForSequenceClassification.from_pretrained(tmp_path / "base")
    model = adapter(base, method, final=final, task_type="SEQ_CLS", modules_to_save=["pooler"])
    with torch.no_grad():
        base.bert.pooler.modules_to_save["default"].dense.weight.mul_(1.5)
    expected = logits(model, batch)
    model.save_pretrained(tmp_path / "adapter")
    for low_memory in (False, True):
        loaded = PeftModel.from_pretrained(make_bert(), tmp_path / "adapter", low_cpu_mem_usage=low_memory)
        assert torch.equal(logits(loaded, batch), expected)
    auto = AutoPeftModelForSequenceClassification.from_pretrained(tmp_path / "adapter")
    assert torch.equal(logits(auto, batch), expected)
    status = auto.get_model_status()
    kind = auto.peft_config["default"].peft_type.value
    assert status.peft_types == {"default": kind} and status.enabled is True and not status.merged_adapters
    pruned = [entry for entry in auto.get_layer_status() if entry.name.endswith("attention.output.dense")]
    assert len(pruned) == 2 and all(entry.available_adapters == ["default"] and entry.enabled for entry in pruned)
    with pytest.raises(ValueError, match=f"only supports LORA but {kind} was passed"):
        hotswap_adapter(auto, str(tmp_path / "adapter"), "default")
    assert torch.equal(logits(auto, batch), expected)
    plain = auto.unload()
    assert torch.equal(
        plain.bert.encoder.layer[0].output.dense.weight, make_bert().bert.encoder.layer[0].output.dense.weight
    )
    assert not pruning_layers(plain)


@pytest.mark.parametrize("method", METHODS)
def test_other_methods_on_one_peft_model_are_refused(method):
    with pytest.raises(ValueError, match="not compatible with the `PeftMixedModel`"):
        get_peft_model(make_bert(), LoraConfig(target_modules=["query"]), mixed=True).add_adapter("p", config(method))
    with pytest.raises(ValueError, match="different peft types"):
        get_peft_model(make_bert(), LoraConfig(target_modules=["query"])).add_adapter("p", config(method))


@needs_adapters_of_transformers
@pytest.mark.parametrize("method", METHODS)
def test_a_mask_below_a_lora_is_refused(method):
    model = make_bert()
    model.add_adapter(LoraConfig(target_modules=["output.dense", "query"]), "lora")
    with pytest.raises(TypeError, match="adapted already, by peft.tuners.lora"):
        model.add_adapter(config(method), "p")


@needs_adapters_of_transformers
@pytest.mark.parametrize("method", METHODS)
def test_lora_on_top_of_a_mask(method, batch):
    """Through Transformers' own `add_adapter`, the mask first; the same as a LoRA on the merged model."""
    lora = LoraConfig(target_modules=["attention.output.dense"], init_lora_weights=False)
    base = make_bert()
    base.add_adapter(config(method), "mask")
    if method in TRAINED:
        finalize(advance(base, method))
    else:
        advance(base, method)
    masked = logits(base, batch)
    merged = adapter(make_bert(), method).merge_and_unload(shrink=False)
    torch.testing.assert_close(logits(merged, batch), masked)
    base.add_adapter(lora, "lora")
    reference = get_peft_model(merged, lora)
    ours = {name.replace(".lora.", ".default."): p for name, p in base.named_parameters() if ".lora_" in name}
    with torch.no_grad():
        for name, parameter in reference.base_model.model.named_parameters():
            if ".lora_" in name:
                parameter.copy_(ours[name])
    base.set_adapter(["mask", "lora"])
    torch.testing.assert_close(logits(base, batch), logits(reference, batch))
    base.set_adapter("mask")
    assert torch.equal(logits(base, batch), masked)


# ------------------------------------------------------------ precision, memory


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("autocast", [True, False])
@pytest.mark.parametrize("method", METHODS)
def test_half_precision(method, autocast, dtype, tmp_path, batch):
    how = {"autocast_adapter_dtype": autocast}
    model = advance(get_peft_model(make_bert().to(dtype), config(method, task_type="SEQ_CLS"), **how), method)
    model.train()(**batch).loss.backward()
    trained = [p for layer in pruning_layers(model) for p in layer.parameters() if p.requires_grad]
    assert {p.dtype for p in trained} <= {torch.float32 if autocast else dtype}
    assert method not in TRAINED or any(p.grad is not None and p.grad.any() for p in trained)
    if method in TRAINED:
        finalize(model)
    expected = logits(model, batch)
    assert expected.dtype == dtype
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(PeftModel.from_pretrained(make_bert().to(dtype), tmp_path, **how), batch), expected)


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("method", TRAINED)
def test_gradient_checkpointing(method, reentrant, batch):
    def gradients(checkpointed):
        model = advance(get_peft_model(make_llama(), config(method)), method)
        if checkpointed:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
            model.enable_input_require_grads()
        model.train()(input_ids=batch["input_ids"], labels=batch["input_ids"]).loss.backward()
        return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}

    expected, found = gradients(False), gradients(True)
    assert expected.keys() == found.keys() and len(expected) >= 8
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient)


# ------------------------------------------------------------- compile, export


def small():
    return make_bert(num_hidden_layers=1)


def two_layers():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 12), nn.GELU(), nn.Linear(12, 8))


class Logits(nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, ids):
        return self.model(input_ids=ids).logits


def train_and_infer(method, compile_):
    """Three optimizer steps while the mask changes, and inference with the final one."""
    torch._dynamo.reset()
    model = get_peft_model(two_layers(), config(method, target_modules=["0", "2"]))
    update_schedule(model, 0, 3)
    base = model.get_base_model().train()
    train = compile_(base)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.5)
    x = torch.randn(5, 8, generator=torch.Generator().manual_seed(1))
    for step in range(3):
        train(x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        update_schedule(model, step + 1)
    finalize(model)
    base.eval()
    with torch.no_grad():
        base(x)  # masks are unpacked in the first forward pass
        return compile_(base)(x)


@pytest.mark.slow
@pytest.mark.parametrize("method", TRAINED)
def test_compiled_training_and_inference_are_one_graph(method):
    torch._dynamo.utils.counters.clear()
    compiled = train_and_infer(method, lambda m: torch.compile(m, backend="aot_eager", fullgraph=True))
    torch.testing.assert_close(compiled, train_and_infer(method, lambda m: m))
    assert not torch._dynamo.utils.counters["graph_break"]


@pytest.mark.slow
@pytest.mark.parametrize("method", CALIBRATED)
def test_calibrated_methods_compile(method, batch):
    torch._dynamo.reset()
    base = adapter(small(), method).get_base_model()
    expected = logits(base, batch)
    assert torch.equal(logits(torch.compile(base, backend="aot_eager", fullgraph=True), batch), expected)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs a C++ compiler")
def test_inductor():
    def gradient(compile_):
        torch._dynamo.reset()
        torch.manual_seed(0)
        model = get_peft_model(nn.Sequential(nn.Linear(8, 4)), SMPConfig(target_modules=["0"], sparsity=0.5))
        update_schedule(model, 3, 3)
        compile_(model.get_base_model().train())(torch.ones(3, 8)).square().mean().backward()
        return pruning_layers(model)[0].scores["default"].grad

    torch.testing.assert_close(gradient(torch.compile), gradient(lambda m: m))


@pytest.mark.slow
def test_gates_compile_with_a_graph_break():
    """The noise of `variant="l0"` is drawn outside the graph, from the seed of the step."""

    def gradient(compiled):
        torch._dynamo.reset()
        model = get_peft_model(two_layers(), MovementPruningConfig(variant="l0", target_modules=["0"]))
        update_schedule(model, 0, 2)
        base = model.get_base_model().train()
        train = torch.compile(base, backend="aot_eager") if compiled else base
        train(torch.ones(3, 8)).square().mean().backward()
        return pruning_layers(model)[0].scores["default"].grad

    torch.testing.assert_close(gradient(True), gradient(False))


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_export(method, tmp_path, batch):
    make, fields, ids = two_layers, {"target_modules": ["0", "2"]}, torch.ones(3, 8)
    if method not in TRAINED:
        make, fields, ids = small, {}, batch["input_ids"]
    adapter(make(), method, **fields).save_pretrained(tmp_path)
    module = PeftModel.from_pretrained(make(), tmp_path).eval().get_base_model()
    module = module if method in TRAINED else Logits(module)
    with torch.no_grad():
        if method in (
            "movement",
            "structured",
            "sparsegpt",
        ):  # kept values are decoded when they are needed, masks when loaded
            with pytest.raises(RuntimeError, match="Call the model once before torch.export"):
                torch.export.export(module, (ids,), strict=False)
        else:
            torch.export.export(module, (ids,), strict=False)
        expected = module(ids)
        for strict in (False, True):
            program = torch.export.export(module, (ids,), strict=strict)
            torch.testing.assert_close(program.module()(ids), expected)
    torch.testing.assert_close(torch.export.export(module, (ids,), strict=False).module()(ids), expected)


# ------------------------------------------------------------------------- docs


def test_every_row_of_the_table_has_a_test():
    root = Path(__file__).parents[1]
    rows = [line for line in (root / "docs" / "support.md").read_text().splitlines() if line.startswith("| ")]
    rows = [row for row in rows if not row.startswith("| what")]
    tests = "".join(path.read_text() for path in (root / "tests").glob("test_*.py"))
    assert len(rows) > 20
    for row in rows:
        named = re.findall(r"`(test_\w+)`", row)
        assert named, row
        for name in named:
            assert f"def {name}(" in tests, name
