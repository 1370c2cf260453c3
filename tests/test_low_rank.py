"""Scores of low rank, and masks that are renewed every few steps."""

import pytest
import torch
import torch.nn.functional as F
from helpers.models import logits, make_bert
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers.pytorch_utils import Conv1D

from peft_prune import MovementPruningConfig, SMPConfig, create_pruning_optimizer, finalize, update_schedule
from peft_prune.layers.layer import pruning_layers


def scores_of(layer, weight):
    """What the paper says they are, written out."""
    a, b = (layer.held(kind)["default"].detach().clone().requires_grad_() for kind in ("scores_A", "scores_B"))
    block = layer.block("default")
    start = (weight.abs() / weight.std()).view(weight.shape[0] // block[0], block[0], weight.shape[1] // block[1], -1)
    rows, columns = a[:, -1].unsqueeze(1), b[-1].unsqueeze(0)
    return a, b, start.mean((1, 3)) + a[:, :-1] @ b[:-1] + rows + columns


@pytest.mark.parametrize("penalty", [0.0, 500.0])
@pytest.mark.parametrize("granularity", ["weight", "4x4"])
@pytest.mark.parametrize("make", [SMPConfig, MovementPruningConfig])
@pytest.mark.parametrize("conv1d", [False, True])
def test_gradient_of_the_factors_is_autograds(make, granularity, penalty, conv1d):
    torch.manual_seed(0)
    module = Conv1D(32, 24) if conv1d else nn.Linear(24, 32)
    config = make(
        target_modules=["0"], sparsity=0.75, score="low_rank", score_rank=3, granularity=granularity, penalty=penalty,
        score_init="magnitude",
    )  # fmt: skip
    model = get_peft_model(nn.Sequential(module), config).train()
    (layer,) = pruning_layers(model)
    with torch.no_grad():
        for kind in ("scores_A", "scores_B"):
            layer.held(kind)["default"].normal_()
    update_schedule(model, 10, 10)
    x, target = torch.randn(5, 24), torch.randn(5, 32)
    F.mse_loss(model(x), target).backward()

    weight = (layer.weight.T if conv1d else layer.weight).detach()
    a, b, scores = scores_of(layer, weight)
    kept = round(scores.numel() / 4)
    mask = torch.zeros(scores.numel()).scatter(0, scores.detach().flatten().topk(kept).indices, 1.0).view_as(scores)
    block = layer.block("default")
    spread = (mask + scores - scores.detach()).repeat_interleave(block[0], 0).repeat_interleave(block[1], 1)
    loss = F.mse_loss(F.linear(x, weight * spread, layer.bias.detach()), target)
    (loss + penalty * scores.sigmoid().mean()).backward()
    torch.testing.assert_close(layer.held("scores_A")["default"].grad, a.grad)
    torch.testing.assert_close(layer.held("scores_B")["default"].grad, b.grad)
    assert layer.kept("default") == layer.get_mask("default").sum() == 24 * 32 // 4


def test_as_many_numbers_are_trained_as_by_a_lora_of_rank_8():
    def trained(config):
        return sum(p.numel() for p in get_peft_model(make_bert(), config).parameters() if p.requires_grad)

    targets = ["query", "key", "value", "output.dense", "intermediate.dense"]
    assert trained(SMPConfig(target_modules=targets, score="low_rank")) == trained(
        LoraConfig(target_modules=targets, r=8)
    )


@pytest.mark.parametrize("allocation", ["local", "score", "global"])
def test_training_reaches_the_sparsity_and_the_adapter_is_a_mask(allocation, batch, tmp_path):
    config = SMPConfig(sparsity=0.8, allocation=allocation, score="low_rank", score_rank=2, task_type="SEQ_CLS")
    model = get_peft_model(make_bert(), config).train()
    optimizer = create_pruning_optimizer(model, lr=1e-3)
    assert optimizer.param_groups[-1]["lr"] == config.score_lr and len(optimizer.param_groups[-1]["params"]) == 24
    update_schedule(model, 0, 4)
    started = [layer.get_mask("default").clone() for layer in pruning_layers(model)]
    for step in range(1, 5):
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        update_schedule(model, step, 4)
        if step == 2:
            model.save_pretrained(tmp_path / "unfinished")
            halfway = [layer.get_mask("default").clone() for layer in pruning_layers(model)]
    resumed = PeftModel.from_pretrained(make_bert(), tmp_path / "unfinished", is_trainable=True)
    for layer, mask in zip(pruning_layers(resumed), halfway, strict=True):
        assert torch.equal(layer.get_mask("default"), mask) and not layer.scores
    layers = pruning_layers(model)
    kept = sum(int(layer.get_mask("default").sum()) for layer in layers)
    assert kept == pytest.approx(0.2 * sum(layer.weight.numel() for layer in layers), abs=len(layers))
    assert any(not torch.equal(layer.get_mask("default"), old) for layer, old in zip(layers, started, strict=True))
    before = logits(model.eval(), batch)
    finalize(model)
    assert torch.equal(logits(model, batch), before)
    model.save_pretrained(tmp_path / "final")
    loaded = PeftModel.from_pretrained(make_bert(), tmp_path / "final")
    assert torch.equal(logits(loaded, batch), before)
    assert not [name for name, _ in loaded.named_parameters() if "scores" in name]


@pytest.mark.parametrize(
    ("make", "fields", "message"),
    [
        (SMPConfig, {"score": "lowrank"}, "score='lowrank' is unknown"),
        (SMPConfig, {"score": "low_rank", "score_rank": 0}, "score_rank=0"),
        (SMPConfig, {"score": "low_rank", "score_init": "random"}, "score_init='random'"),
        (SMPConfig, {"mask_interval": 0}, "mask_interval=0"),
        (SMPConfig, {"mask_interval": 2.5}, "mask_interval=2.5"),
        (MovementPruningConfig, {"score": "low_rank", "variant": "l0"}, "mask='l0'"),
        (MovementPruningConfig, {"score": "low_rank", "from_existing_zeros": True}, "from_existing_zeros=True"),
    ],
)
def test_what_cannot_be_is_told(make, fields, message):
    with pytest.raises(ValueError, match=message):
        make(**fields)


@pytest.mark.parametrize(
    "config",
    [SMPConfig(score="low_rank", score_rank=3), MovementPruningConfig(variant="magnitude"), SMPConfig()],
    ids=["low rank", "magnitude", "scores of their own"],
)
def test_masks_that_follow_from_weights_are_not_renewed_while_these_are_merged(config):
    model = get_peft_model(make_bert(), config)
    update_schedule(model, 1, 2)
    model.merge_adapter()
    with pytest.raises(ValueError, match="unmerge_adapter"):
        update_schedule(model, 2, 2)
    model.unmerge_adapter()
    update_schedule(model, 2, 2)


def test_a_base_without_weights_is_told():
    with torch.device("meta"):
        base = nn.Sequential(nn.Linear(24, 32))
    with pytest.raises(ValueError, match="on device 'meta'"):
        get_peft_model(base, SMPConfig(target_modules=["0"], score="low_rank", score_rank=3), low_cpu_mem_usage=True)


def test_a_rank_that_is_not_low_is_told():
    with pytest.raises(ValueError, match="score_rank=8"):
        get_peft_model(nn.Sequential(nn.Linear(8, 32)), SMPConfig(target_modules=["0"], score="low_rank", score_rank=8))


@pytest.mark.parametrize("score", ["movement", "low_rank"])
def test_masks_are_renewed_every_few_steps_and_at_the_end(score):
    model = get_peft_model(
        nn.Sequential(nn.Linear(24, 32)),
        SMPConfig(target_modules=["0"], sparsity=0.75, mask_interval=4, score=score, score_rank=3),
    ).train()
    (layer,) = pruning_layers(model)
    trained = [p for p in model.parameters() if p.requires_grad]
    masks = []
    for step in range(11):
        update_schedule(model, step, 10)
        masks.append(layer.get_mask("default").clone())
        assert layer.progress["default"][0] == step
        model(torch.randn(2, 24)).sum().backward()
        assert torch.equal(layer.get_mask("default"), masks[-1])
        with torch.no_grad():
            for p in trained:
                p.add_(torch.randn_like(p))
    renewed = [step for step in range(1, 11) if not torch.equal(masks[step], masks[step - 1])]
    assert renewed == [4, 8, 10] and masks[10].float().mean() == 0.25
