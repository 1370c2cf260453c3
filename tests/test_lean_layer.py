"""What a layer keeps in memory: little for its backward pass, and in inference its masked weight."""

import copy

import pytest
import torch
import torch.nn.functional as F
from helpers.methods import prune, randomize_scores
from helpers.models import logits, make_bert
from peft import get_peft_model
from torch import nn

from peft_prune import MovementPruningConfig, SMPConfig, cache_masked_weights, update_schedule
from peft_prune.layers.layer import pruning_layers


CONFIGS = {
    "smp": SMPConfig(target_modules=["0"], sparsity=0.75, penalty=0.0),
    "hard": MovementPruningConfig(target_modules=["0"], sparsity=0.75),
    "magnitude": MovementPruningConfig(variant="magnitude", target_modules=["0"], sparsity=0.75),
}


@pytest.mark.parametrize("name", list(CONFIGS))
def test_backward_keeps_no_tensor_of_the_weights_size_but_the_weight_and_its_update(name):
    model = get_peft_model(nn.Sequential(nn.Linear(96, 64)), copy.deepcopy(CONFIGS[name])).train()
    update_schedule(model, 10, 10)
    (layer,) = pruning_layers(model)
    saved = []

    def pack(tensor):
        saved.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model(torch.randn(5, 96)).sum().backward()
    own = {p.data_ptr() for p in (layer.weight, *layer.update.values(), layer.get_mask("default"))}
    large = [t for t in saved if t.numel() >= 96 * 64 and t.data_ptr() not in own]
    assert saved and not large


def test_the_output_may_be_changed_in_place_as_that_of_a_linear_layer():
    def gradients(in_place):
        torch.manual_seed(0)
        model = get_peft_model(nn.Sequential(nn.Linear(96, 64)), copy.deepcopy(CONFIGS["hard"])).train()
        randomize_scores(model)
        update_schedule(model, 10, 10)
        query, bias = model(torch.randn(2, 3, 96)).view(2, 3, 4, 16).permute(0, 2, 1, 3), torch.randn(16)
        if in_place:
            query += bias  # as in DeBERTa
        else:
            query = query + bias
        (query**2).sum().backward()
        return [parameter.grad for parameter in model.parameters() if parameter.requires_grad]

    for one, other in zip(gradients(True), gradients(False), strict=True):
        assert one.abs().sum() > 0
        torch.testing.assert_close(one, other)


def test_update_and_bias_get_autograds_own_gradient():
    torch.manual_seed(0)
    model = get_peft_model(nn.Sequential(nn.Linear(96, 64)), copy.deepcopy(CONFIGS["hard"])).train()
    (layer,) = pruning_layers(model)
    randomize_scores(model)
    with torch.no_grad():
        layer.update["default"].normal_()
    layer.get_base_layer().bias.requires_grad_()
    update_schedule(model, 10, 10)
    x, target = torch.randn(2, 3, 96), torch.randn(2, 3, 64)
    x.requires_grad_()
    F.mse_loss(model(x), target).backward()

    copies = [t.detach().clone().requires_grad_() for t in (layer.update["default"], layer.bias, x)]
    weight = (layer.weight.detach() + copies[0]) * layer.get_mask("default")
    F.mse_loss(F.linear(copies[2], weight, copies[1]), target).backward()
    for ours, theirs in zip((layer.update["default"], layer.bias, x), copies, strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad)


def test_autocast_computes_in_its_dtype_and_keeps_gradients_in_theirs():
    torch.manual_seed(0)
    model = get_peft_model(nn.Sequential(nn.Linear(96, 64)), copy.deepcopy(CONFIGS["smp"])).train()
    update_schedule(model, 10, 10)
    (layer,) = pruning_layers(model)
    x = torch.randn(8, 96)
    full = model(x)
    full.square().mean().backward()
    expected, layer.scores["default"].grad = layer.scores["default"].grad, None
    with torch.autocast("cpu", torch.bfloat16):
        half = model(x)
        half.float().square().mean().backward()
    assert half.dtype == torch.bfloat16 and layer.scores["default"].grad.dtype == torch.float32
    torch.testing.assert_close(half.float(), full, atol=3e-2, rtol=3e-2)
    torch.testing.assert_close(layer.scores["default"].grad, expected, atol=1e-3, rtol=5e-2)


def test_inference_uses_one_masked_weight_until_something_changes(batch):
    base = make_bert()
    model = prune(base, 0.5).eval()
    layers = pruning_layers(model)
    with torch.no_grad():
        first = logits(model, batch)
        kept = [layer.cached_weight._weight for layer in layers]
        assert torch.equal(logits(model, batch), first)
        assert all(layer.cached_weight._weight is weight for layer, weight in zip(layers, kept, strict=True))

        layers[0].weight.mul_(2)  # counted by torch
        changed = logits(model, batch)
        assert not torch.equal(changed, first)
        cache_masked_weights(model, False)
        assert torch.equal(logits(model, batch), changed) and layers[0].cached_weight._weight is None
        cache_masked_weights(model)
        layers[0].weight.div_(2)
        assert torch.equal(logits(model, batch), first)

    model.add_adapter("other", SMPConfig(sparsity=0.8))
    model.set_adapter("other")
    randomize_scores(model, 3, "other")
    update_schedule(model, 10, 10)
    other = logits(model, batch)
    assert not torch.equal(other, first)
    model.set_adapter("default")
    assert torch.equal(logits(model, batch), first)
    model.merge_adapter()
    assert all(layer.cached_weight._weight is None for layer in layers)
    assert torch.equal(logits(model, batch), first)
    model.unmerge_adapter()
    model.train()
    assert all(layer.cached_weight._weight is None for layer in layers)


def test_a_mask_takes_a_bit_a_weight_in_training():
    model = get_peft_model(nn.Sequential(nn.Linear(96, 64)), copy.deepcopy(CONFIGS["smp"])).train()
    update_schedule(model, 10, 10)
    (layer,) = pruning_layers(model)
    held = layer.mask_bits("default")
    assert held.dtype == torch.uint8 and held.numel() == 96 * 64 // 8
    assert layer.mask_bits("default") is held  # nothing has changed
    assert int(layer.get_mask("default").sum()) == 96 * 64 // 4
