"""Blocks with more outliers keep more weights (OWL), compared with ratios that are counted by hand."""

import pytest
import torch
from helpers.models import logits, make_llama
from peft import PeftModel, get_peft_model

from peft_prune import SparseGPTConfig, WandaConfig, calibrate
from peft_prune.layers.layer import pruning_layers


def batches():
    generator = torch.Generator().manual_seed(4)
    return [{"input_ids": torch.randint(0, 90, (2, 24), generator=generator)} for _ in range(3)]


def block_of(name):
    return int(name.split(".")[2])


def uneven():
    """Three blocks, of which the last has many weights far above the others."""
    model = make_llama(num_hidden_layers=3)
    with torch.no_grad():
        for name, module in model.named_modules():
            if isinstance(module, torch.nn.Linear) and ".2." in name:
                module.weight[:, ::7] *= 20
    return model


def outliers(model):
    """Of each block, how many of all |W|·‖x‖ are above five times their mean, in the dense model."""
    seen, handles = {}, []
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and ".layers." in name:
            note = lambda m, args, name=name: seen.setdefault(name, []).append(args[0].flatten(0, 1))  # noqa: E731
            handles.append(module.register_forward_pre_hook(note))
    with torch.no_grad():
        for batch in batches():
            model(**batch)
    for handle in handles:
        handle.remove()
    blocks = {}
    for name, inputs in seen.items():
        scores = model.get_submodule(name).weight.detach().abs() * torch.cat(inputs).norm(dim=0)
        blocks.setdefault(block_of(name), []).append(scores.flatten())
    scores = {number: torch.cat(parts) for number, parts in blocks.items()}
    return {number: float((part > 5 * part.mean()).float().mean()) for number, part in scores.items()}


@pytest.mark.parametrize("config", [WandaConfig, SparseGPTConfig])
def test_sparsities_of_blocks_follow_their_outliers(config, tmp_path):
    ratios = outliers(uneven())
    model = get_peft_model(uneven(), config(task_type="CAUSAL_LM", sparsity=0.6, allocation="owl", num_samples=6))
    reported = calibrate(model, (batch for batch in batches()))
    assert reported["sparsity"] == pytest.approx(0.6, abs=0.01)
    # equal blocks, so the mean is plain: offsets from 0 to -0.16 by the ratio, moved to the mean of 0.6
    span = max(ratios.values()) - min(ratios.values())
    offsets = {number: -0.16 * (ratio - min(ratios.values())) / span for number, ratio in ratios.items()}
    shift = 0.6 - sum(offsets.values()) / 3
    for layer in pruning_layers(model):
        removed = 1 - float(layer.get_mask("default").float().mean())
        assert removed == pytest.approx(offsets[block_of(layer.module_name)] + shift, abs=0.02), layer.module_name
    expected = logits(model, batches()[0])
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(PeftModel.from_pretrained(uneven(), tmp_path), batches()[0]), expected)


def test_modules_with_a_sparsity_of_their_own_keep_it():
    config = WandaConfig(
        task_type="CAUSAL_LM", sparsity=0.5, allocation="owl", sparsity_pattern={"q_proj": 0.25}, num_samples=6
    )
    model = get_peft_model(uneven(), config)
    calibrate(model, batches())
    kept = {}
    for layer in pruning_layers(model):
        own = "q_proj" in layer.module_name
        kept.setdefault(own, []).append(layer.get_mask("default").flatten().float())
    assert float(torch.cat(kept[True]).mean()) == pytest.approx(0.75)
    assert float(torch.cat(kept[False]).mean()) == pytest.approx(0.5, abs=0.01)


def test_interrupted_it_leaves_nothing_behind():
    model = get_peft_model(uneven(), WandaConfig(task_type="CAUSAL_LM", allocation="owl", num_samples=6))
    layer = pruning_layers(model)[-1]
    calls = []

    def interrupt(module, args):
        calls.append(module)
        if len(calls) == 5:  # three batches of the look, then of the walk
            raise KeyboardInterrupt

    handle = layer.register_forward_pre_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        calibrate(model, batches())
    handle.remove()
    assert len(calls) == 5 and layer.target_sparsity("default") == 0.5 and not layer.has_mask("default")
    calibrate(model, batches())
    assert layer.target_sparsity("default") < 0.5


def test_what_cannot_be_is_told():
    with pytest.raises(ValueError, match="allocation='global'.*'local'"):
        WandaConfig(allocation="global")
    with pytest.raises(ValueError, match="granularity='2:4' fixes the sparsity of every matrix, so allocation='owl'"):
        SparseGPTConfig(granularity="2:4", allocation="owl")


def test_a_sparsity_that_owl_cannot_reach_is_told_before_anything_is_run():
    with pytest.raises(ValueError, match=r"sparsity=0\.9995 must be in \[0, 0\.999\] for allocation='owl'"):
        WandaConfig(sparsity=0.9995, allocation="owl")
