"""A small low-rank update under a mask counts in half precision, although rounding hides it in each single weight."""

import pytest
import torch
from helpers.models import make_llama
from peft import get_peft_model
from torch import nn

from peft_prune import MovementPruningConfig, update_schedule
from peft_prune.layers.layer import pruning_layers
from peft_prune.layers.masked_linear import MaskedLinear
from peft_prune.storage.bits import pack_bits


OUT, IN = 1024, 1024


def parts():
    """A weight that bfloat16 can hold, an update of rank one below half a step of each number, a mask, and inputs."""
    generator = torch.Generator().manual_seed(0)
    signs = torch.randint(0, 2, (OUT + 1, IN), generator=generator) * 2.0 - 1
    weight = ((torch.rand(OUT, IN, generator=generator) + 1) * signs[:OUT]).to(torch.bfloat16).float()  # 1 to 2 in size
    update = torch.rand(OUT, 1, generator=generator) * signs[OUT:] * 2**-10
    mask = torch.rand(OUT, IN, generator=generator) < 0.5
    return weight, update, mask, signs[OUT:] + torch.randn(256, IN, generator=generator)


class Net(nn.Module):
    def __init__(self, weight):
        super().__init__()
        self.lin = nn.Linear(IN, OUT, bias=False, dtype=weight.dtype)
        self.lin.weight.data.copy_(weight)

    def forward(self, x):
        return self.lin(x)


@pytest.mark.parametrize(("dtype", "autocast"), [(torch.float32, True), (torch.bfloat16, False)])
def test_an_update_below_the_rounding_of_the_weights_is_seen(dtype, autocast):
    weight, update, _, inputs = parts()
    assert torch.equal((weight + update).to(torch.bfloat16), weight.to(torch.bfloat16))
    fields = {"update": "low_rank", "r": 1, "lora_alpha": 1, "sparsity": 0.5, "target_modules": ["lin"]}
    model = get_peft_model(Net(weight.to(dtype)), MovementPruningConfig(variant="hard", **fields)).train()
    update_schedule(model, 10, total_steps=10)
    (layer,) = pruning_layers(model)
    layer.held("A")["default"].data.copy_(update[:1] / update[0, 0])  # signs
    found = []
    for factor in (0, 1):
        layer.held("B")["default"].data.copy_(factor * update[:, :1])
        x = inputs.to(dtype, copy=True).requires_grad_()
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            y = model(x)
        assert y.dtype == torch.bfloat16
        y.float().backward(torch.ones(y.shape))  # in direction of the update's column, which has one sign
        found.append((y.detach().float(), x.grad.float()))
    change = layer.held("B")["default"].detach() @ layer.held("A")["default"].detach() * layer.get_mask("default")
    for before, after, expected in (
        (found[0][0], found[1][0], inputs @ change.T),
        (found[0][1], found[1][1], (torch.ones(256, OUT) @ change)),
    ):
        slope = ((after - before) * expected).sum() / expected.square().sum()  # single numbers are rounded
        assert float(slope) == pytest.approx(1.0, abs=0.1)


def test_in_float32_nothing_changes():
    weight, update, mask, inputs = parts()
    together, apart = (
        MaskedLinear.apply(inputs, None, update, weight, None, pack_bits(mask), None, (1, 1), apart)
        for apart in (False, True)
    )
    assert torch.equal(together, apart)
    torch.testing.assert_close(apart, inputs @ ((weight + update) * mask).T, rtol=1e-4, atol=1e-3)


def test_a_lora_under_the_mask_learns_in_bfloat16():
    torch.manual_seed(0)
    base = make_llama().to(torch.bfloat16).float()
    config = MovementPruningConfig(task_type="CAUSAL_LM", update="low_rank", r=4, sparsity=0.5, variant="hard")
    model = get_peft_model(base, config).train()
    update_schedule(model, 0, total_steps=10)
    layers = pruning_layers(model)
    optimizer = torch.optim.AdamW([layer.held(kind)["default"] for layer in layers for kind in "AB"], lr=3e-3)
    ids = torch.randint(3, 90, (4, 16))
    losses = []
    for _ in range(30):
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        model.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.1
