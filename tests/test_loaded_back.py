"""What was loaded back lives on: compiled, with sparse kernels, with a LoRA, pruned further. Whoever loaded it."""

import pytest
import torch
from helpers.models import make_llama
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM

from peft_prune import (
    StructuredPruningConfig,
    WandaConfig,
    calibrate,
    load_compact,
    load_sparse,
    model_size,
    save_compact,
    save_sparse,
    save_standard,
    use_dense_kernels,
    use_sparse_kernels,
)


IDS = torch.randint(3, 90, (4, 12), generator=torch.Generator().manual_seed(0))
WAYS = {
    "save_sparse, load_sparse": (
        WandaConfig(task_type="CAUSAL_LM", sparsity=0.75, num_samples=4), save_sparse, load_sparse,
    ),
    "save_compact, load_compact": (
        StructuredPruningConfig(task_type="CAUSAL_LM", keep_ratio=0.8, num_samples=4), save_compact, load_compact,
    ),
    "save_standard, AutoModel": (
        StructuredPruningConfig(task_type="CAUSAL_LM", keep_ratio=0.8, shapes="uniform", num_samples=4),
        save_standard, AutoModelForCausalLM.from_pretrained,
    ),
}  # fmt: skip


def logits(model):
    with torch.no_grad():
        return model(input_ids=IDS).logits


@pytest.fixture(scope="module", params=list(WAYS))
def saved(request, tmp_path_factory):
    """Folder, what loads it, and the logits of the model that was saved."""
    config, save, load = WAYS[request.param]
    base = make_llama(hidden_size=64, intermediate_size=96, num_attention_heads=8, num_key_value_heads=4)
    model = get_peft_model(base, config)
    calibrate(model, [{"input_ids": IDS}])
    merged, folder = model.merge_and_unload().eval(), tmp_path_factory.mktemp("saved")
    save(merged, folder)
    return folder, load, logits(merged)


def zeros(model):
    """Which weights of the blocks' linear layers are zero, by name."""
    return {n: p == 0 for n, p in model.named_parameters() if "_proj" in n and p.dim() == 2}


def test_the_loaded_model_computes_the_same(saved):
    folder, load, expected = saved
    model = load(folder)
    assert not model.training
    torch.testing.assert_close(logits(model), expected)


@pytest.mark.slow
def test_it_compiles_to_one_graph(saved):
    folder, load, expected = saved
    torch._dynamo.reset()
    compiled = torch.compile(load(folder), backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(logits(compiled), expected, atol=1e-5, rtol=1e-5)


def test_it_takes_sparse_kernels(saved):
    folder, load, expected = saved
    model = load(folder)
    report = use_sparse_kernels(model, tokens=48, margin=1.0)
    assert report is not None
    torch.testing.assert_close(logits(model), expected, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(logits(use_dense_kernels(model)), expected, atol=1e-4, rtol=1e-4)


def test_it_takes_a_lora_that_is_trained_saved_and_loaded(saved, tmp_path):
    folder, load, before = saved
    torch.manual_seed(0)
    model = get_peft_model(load(folder), LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear"))
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0)
    for _ in range(2):
        model(input_ids=IDS, labels=IDS).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    expected = logits(model.eval())
    assert not torch.allclose(expected, before, atol=1e-3)
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(load(folder), tmp_path)
    torch.testing.assert_close(logits(again), expected)
    torch.testing.assert_close(logits(again.merge_and_unload()), expected, atol=1e-5, rtol=1e-4)


def test_weights_are_pruned_further(saved):
    folder, load, _ = saved
    before = zeros(load(folder))
    model = get_peft_model(load(folder), WandaConfig(task_type="CAUSAL_LM", sparsity=0.875, num_samples=4))
    calibrate(model, [{"input_ids": IDS}])
    expected = logits(model)
    merged = model.merge_and_unload()
    torch.testing.assert_close(logits(merged), expected)
    for name, mask in zeros(merged).items():
        assert mask.float().mean() > 0.75 and mask[before[name]].all(), "what was zero stays zero"


def test_heads_and_neurons_are_removed_further(saved, tmp_path):
    folder, load, _ = saved
    first = load(folder)
    size = model_size(first)
    config = StructuredPruningConfig(task_type="CAUSAL_LM", keep_ratio=0.7, num_samples=4)
    model = get_peft_model(first, config)
    calibrate(model, [{"input_ids": IDS}])
    smaller = model.merge_and_unload().eval()
    assert model_size(smaller).macs < 0.75 * size.macs
    save_compact(smaller, tmp_path)
    torch.testing.assert_close(logits(load_compact(tmp_path)), logits(smaller))
