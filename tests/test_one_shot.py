"""One-shot pruning of language models: masks and values that solvers find, block by block."""

import pytest
import torch
from helpers.models import logits, make_bert, make_gpt2, make_llama
from peft import PeftModel, get_peft_model

from peft_prune import SparseGPTConfig, WandaConfig, calibrate, create_pruning_optimizer
from peft_prune.layers.layer import pruning_layers
from peft_prune.solvers.admm import admm
from peft_prune.solvers.sparsegpt import sparsegpt


def batches(count=3):
    generator = torch.Generator().manual_seed(4)
    return [{"input_ids": torch.randint(0, 90, (2, 24), generator=generator)} for _ in range(count)]


def first_inputs(name):
    """What comes into a layer of the first block, which no pruned block lies before: shape (tokens, in)."""
    plain, seen = make_llama(), []
    handle = plain.get_submodule(name).register_forward_pre_hook(lambda m, args: seen.append(args[0].flatten(0, 1)))
    with torch.no_grad():
        for batch in batches():
            plain(**batch)
    handle.remove()
    return torch.cat(seen)


def output_loss(layer, x):
    """`‖(Ŵ − W)Xᵀ‖²` of a calibrated layer, from its weights alone."""
    return float(((layer.adapted("default", layer.matrix) - layer.matrix).detach() @ x.T).square().sum())


CONFIGS = {
    "sparsegpt": lambda **f: SparseGPTConfig(task_type="CAUSAL_LM", solver="sparsegpt", value_dtype="float32", **f),
    "admm": lambda **f: SparseGPTConfig(task_type="CAUSAL_LM", solver="admm", value_dtype="float32", **f),
    "wanda": lambda **f: WandaConfig(task_type="CAUSAL_LM", refine=None, **f),
    "swaps": lambda **f: WandaConfig(task_type="CAUSAL_LM", refine="swaps", **f),
    "low rank": lambda **f: WandaConfig(task_type="CAUSAL_LM", refine=None, update="low_rank", r=4, **f),
    "admm, low rank": lambda **f: SparseGPTConfig(
        task_type="CAUSAL_LM", value_dtype="float32", update="low_rank", r=4, **f
    ),
}


@pytest.mark.parametrize("solver", [sparsegpt, admm], ids=lambda s: s.__name__)
@pytest.mark.parametrize(("fields", "pattern"), [({"sparsity": 0.5}, 0.5), ({"granularity": "2:4"}, (2, 4))])
def test_a_layer_is_what_its_solver_makes_of_its_inputs(solver, fields, pattern):
    model = get_peft_model(make_llama(), CONFIGS[solver.__name__](**fields))
    calibrate(model, batches())
    for layer in pruning_layers(model)[:2]:
        x = first_inputs(layer.module_name)
        mask, values = solver(layer.matrix.detach(), x.T @ x, pattern)
        assert (mask == layer.get_mask("default")).float().mean() > 0.99
        found = layer.adapted("default", layer.matrix)
        assert torch.equal(found != 0, layer.get_mask("default"))
        torch.testing.assert_close(found * mask, values * layer.get_mask("default"), atol=1e-3, rtol=1e-2)


def test_the_order_of_losses_is_the_expected_one():
    losses = {}
    for name, make in CONFIGS.items():
        model = get_peft_model(make_llama(), make(sparsity=0.5))
        calibrate(model, batches())
        layer = next(layer for layer in pruning_layers(model) if layer.module_name.endswith("0.self_attn.q_proj"))
        losses[name] = output_loss(layer, first_inputs(layer.module_name))
    assert losses["admm"] < losses["sparsegpt"] < losses["wanda"]
    assert losses["swaps"] < losses["wanda"] and losses["low rank"] < losses["wanda"]
    assert losses["admm, low rank"] < losses["admm"]


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("make", [make_llama, make_gpt2])
def test_saved_loaded_merged(name, make, tmp_path):
    model = get_peft_model(make(), CONFIGS[name](sparsity=0.5))
    assert calibrate(model, batches())["sparsity"] == pytest.approx(0.5, abs=0.02)
    batch = batches()[0]
    expected = logits(model, batch)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(make(), tmp_path)
    torch.testing.assert_close(logits(loaded, batch), expected)
    with loaded.disable_adapter():
        torch.testing.assert_close(logits(loaded, batch), logits(make(), batch))
    torch.testing.assert_close(logits(loaded.merge_and_unload(), batch), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("dtype", ["float16", "int8"])
def test_blocks_behind_see_the_values_that_are_stored(dtype, tmp_path):
    model = get_peft_model(make_llama(), SparseGPTConfig(task_type="CAUSAL_LM", value_dtype=dtype))
    calibrate(model, batches())
    expected = logits(model, batches()[0])
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(PeftModel.from_pretrained(make_llama(), tmp_path), batches()[0]), expected)


def test_no_update_of_its_rank_makes_up_for_more_than_that_beside_new_values():
    """Against the singular values of `(W − Ŵ)·√G`, Ŵ being the solver's values."""
    model = get_peft_model(make_llama(), CONFIGS["admm, low rank"](sparsity=0.5))
    calibrate(model, batches())
    layer = next(layer for layer in pruning_layers(model) if layer.module_name.endswith("0.self_attn.q_proj"))
    x = first_inputs(layer.module_name).double()
    change = layer.held("B")["default"] @ layer.held("A")["default"] * (8.0 / 4)
    values = layer.adapted("default", layer.matrix) - change
    torch.testing.assert_close(values * ~layer.get_mask("default"), torch.zeros(layer.shape), atol=1e-6, rtol=0)
    size, vectors = torch.linalg.eigh(x.T @ x)
    root = vectors * size.clamp(min=0).sqrt() @ vectors.T
    left = torch.linalg.svdvals((layer.matrix.detach() - values).double() @ root)[4:].square().sum()
    assert output_loss(layer, x.float()) == pytest.approx(float(left), rel=0.02)


@pytest.mark.parametrize("name", ["low rank", "admm, low rank"])
def test_a_low_rank_update_beside_a_calibrated_mask_can_be_trained(name, tmp_path):
    model = get_peft_model(make_llama(), CONFIGS[name](sparsity=0.5))
    calibrate(model, batches())
    masks = [layer.get_mask("default") for layer in pruning_layers(model)]
    trained = [p for p in model.parameters() if p.requires_grad]
    assert trained and all(p.dim() == 2 for p in trained)
    optimizer, batch = torch.optim.AdamW(trained, 1e-2), batches()[0]
    losses = []
    for _ in range(5):
        loss = model.train()(**batch, labels=batch["input_ids"]).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss))
    assert losses[-1] < losses[0]
    assert all(torch.equal(a, layer.get_mask("default")) for a, layer in zip(masks, pruning_layers(model), strict=True))
    model.eval().save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(make_llama(), tmp_path, is_trainable=True).eval()
    assert sum(p.requires_grad for p in loaded.parameters()) == len(trained)
    torch.testing.assert_close(logits(loaded, batch), logits(model, batch))


def test_encoders_too_and_single_modules_have_their_own_sparsity():
    config = SparseGPTConfig(task_type="SEQ_CLS", sparsity=0.5, sparsity_pattern={"query": 0.25})
    model = get_peft_model(make_bert(), config)
    calibrate(model, batches())
    for layer in pruning_layers(model):
        kept = float(layer.get_mask("default").float().mean())
        assert kept == pytest.approx(0.75 if "query" in layer.module_name else 0.5, abs=0.02)


def test_what_cannot_be_is_told():
    with pytest.raises(ValueError, match="solver='magic'"):
        SparseGPTConfig(solver="magic")
    with pytest.raises(ValueError, match="granularity='row'"):
        SparseGPTConfig(granularity="row")
    with pytest.raises(ValueError, match="refine='yes'"):
        WandaConfig(refine="yes")
    model = get_peft_model(make_llama(), SparseGPTConfig(task_type="CAUSAL_LM", update="low_rank", r=64))
    with pytest.raises(ValueError, match="r=64 is more than the smaller side of 'model.layers.0.self_attn.*, 32. Use"):
        calibrate(model, batches())
    assert all(layer.get_mask("default").all() for layer in pruning_layers(model)), "nothing is half pruned"
    model = get_peft_model(make_llama(), SparseGPTConfig(task_type="CAUSAL_LM"))
    with pytest.raises(ValueError, match="not trained. Calibrate them"):
        create_pruning_optimizer(model, 1e-3)
