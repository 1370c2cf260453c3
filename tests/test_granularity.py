"""Blocks, rows, columns and heads: one score each, kept or removed whole, stored by block."""

import json

import pytest
import torch
from helpers.architectures import inputs, logits, make
from helpers.methods import train
from helpers.models import make_bert, make_gpt2, make_llama
from peft import PeftModel, get_peft_model

from peft_prune import MovementPruningConfig, SMPConfig, finalize, model_size, update_schedule
from peft_prune.layers.layer import pruning_layers
from peft_prune.selection.granularity import BlockGranularity, NMGranularity, parse_granularity, pool, spread
from peft_prune.structure.sites import HEADS, find_sites


ATTENTION = ["query", "key", "value", "attention.output.dense"]


def pruned(base, at=0.5, **fields):
    model = get_peft_model(base, SMPConfig(sparsity=at, score_init="random", **fields))
    update_schedule(model, 10, 10)
    return model


def whole(mask, block):
    """Whether a mask keeps or removes blocks as a whole, by looking at every one."""
    for i in range(0, mask.shape[0], block[0]):
        for j in range(0, mask.shape[1], block[1]):
            part = mask[i : i + block[0], j : j + block[1]]
            if bool(part.any()) != bool(part.all()):
                return False
    return True


@pytest.mark.parametrize(("granularity", "block"), [("8x16", (8, 16)), ("row", (1, None)), ("column", (None, 1))])
@pytest.mark.parametrize("allocation", ["local", "score", "global"])
def test_blocks_of_smp(granularity, block, allocation, tmp_path):
    targets = None if allocation == "local" else ["query", "key", "value"]  # blocks of one size
    model = pruned(make_bert(), granularity=granularity, allocation=allocation, target_modules=targets)
    kept = total = 0
    for layer in pruning_layers(model):
        mask = layer.get_mask("default")
        size = (block[0] or layer.shape[0], block[1] or layer.shape[1])
        assert layer.scores["default"].shape == (layer.shape[0] // size[0], layer.shape[1] // size[1])
        assert whole(mask, size) and int(mask.sum()) == layer.kept("default")
        if allocation == "local":
            assert mask.float().mean() == 0.5
        kept, total = kept + int(mask.sum()), total + mask.numel()
    assert kept / total == pytest.approx(0.5, abs=1e-9)
    masks = [layer.get_mask("default") for layer in pruning_layers(model)]
    finalize(model)
    model.save_pretrained(tmp_path)
    info = json.loads((tmp_path / "adapter_config.json").read_text())["mask_info"]
    again = PeftModel.from_pretrained(make_bert(), tmp_path)
    for layer, mask in zip(pruning_layers(again), masks, strict=True):
        assert torch.equal(layer.get_mask("default"), mask)
        entry = info[layer.module_name]
        assert entry["block"] == [block[0] or layer.shape[0], block[1] or layer.shape[1]]
        assert entry["bytes"] <= 1 + -(-mask.numel() // (entry["block"][0] * entry["block"][1] * 8))


@pytest.mark.parametrize("config", [SMPConfig, MovementPruningConfig])
@pytest.mark.parametrize("targets", [None, ATTENTION])
def test_heads(config, targets, tmp_path):
    model = get_peft_model(
        make("bert"), config(granularity="head", sparsity=0.5, target_modules=targets, score_init="random")
    )
    update_schedule(model, 10, 10)
    for layer in pruning_layers(model):
        is_output = layer.module_name.endswith("attention.output.dense")
        assert layer.scores["default"].shape == ((1, 4) if is_output else (4, 1))
        assert whole(layer.get_mask("default"), (32, 8) if is_output else (8, 32))
    finalize(model)
    masked = logits(model.eval(), inputs("bert"))
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(make("bert"), tmp_path)
    assert torch.equal(logits(again, inputs("bert")), masked)
    smaller = again.merge_and_unload()  # heads are removed whole, so the model becomes smaller
    assert model_size(smaller, 10).heads == 6
    torch.testing.assert_close(logits(smaller, inputs("bert")), masked, atol=1e-5, rtol=1e-5)


def test_heads_that_share_keys_go_as_a_group():
    model = pruned(make_llama(), granularity="head", target_modules=["q_proj", "v_proj", "o_proj"])
    shapes = {layer.module_name.split(".")[-1]: tuple(layer.scores["default"].shape) for layer in pruning_layers(model)}
    assert shapes == {"q_proj": (2, 1), "v_proj": (2, 1), "o_proj": (1, 2)}


def test_columns_of_the_feed_forward_make_a_smaller_model():
    model = pruned(make("bert"), granularity="column", at=0.75, target_modules=[
        f"encoder.layer.{i}.output.dense" for i in range(3)
    ])  # fmt: skip
    finalize(model)
    masked = logits(model.eval(), inputs("bert"))
    smaller = model.merge_and_unload()
    assert model_size(smaller, 10).neurons == 3 * 12
    torch.testing.assert_close(logits(smaller, inputs("bert")), masked, atol=1e-5, rtol=1e-5)


def test_an_unknown_architecture_is_merged_all_the_same():
    base = make_bert()
    base.config.model_type = "my-bert"
    model = pruned(base, granularity="column")
    finalize(model)
    with pytest.warns(UserWarning, match="not made smaller.*'my-bert'"):
        merged = model.merge_and_unload()
    assert merged.bert.encoder.layer[0].output.dense.weight.shape == (32, 48)


def test_weights_stay_dense_unless_asked():
    model = pruned(make("bert"))
    finalize(model)
    assert model_size(model.merge_and_unload(), 10) == model_size(make("bert"), 10)


def test_gradient_of_a_block_is_the_sum_over_its_weights():
    model = pruned(make_gpt2(), granularity="4x8", target_modules=["c_fc"], penalty=0.0)
    fine = pruned(make_gpt2(), granularity="weight", target_modules=["c_fc"], penalty=0.0)
    for one, two in zip(pruning_layers(model), pruning_layers(fine), strict=True):
        with torch.no_grad():
            two.scores["default"].copy_(torch.kron(one.scores["default"], torch.ones(4, 8)))
        two.renew("default")
    ids = torch.randint(0, 90, (2, 7))
    for each in (model, fine):
        each.train()
        each(input_ids=ids, labels=ids).loss.backward()
    for one, two in zip(pruning_layers(model), pruning_layers(fine), strict=True):
        assert torch.equal(one.get_mask("default"), two.get_mask("default"))
        summed = two.scores["default"].grad.view(32, 4, 4, 8).sum((1, 3))
        torch.testing.assert_close(one.scores["default"].grad, summed)


def test_training_a_hybrid_mask():
    """Blocks everywhere, trained: density follows the schedule at the blocks' resolution."""
    model = get_peft_model(make_bert(), MovementPruningConfig(granularity="16x16", sparsity=0.5))
    train(model)
    for layer in pruning_layers(model):
        blocks = layer.shape[0] * layer.shape[1] // 256
        assert layer.kept("default") == 256 * round(0.5 * blocks)


def test_magnitude_of_blocks_starts_at_their_mean():
    model = get_peft_model(make_bert(), SMPConfig(granularity="8x4", score_init="magnitude"))
    for layer in pruning_layers(model):
        weight = layer.matrix.detach()
        i, j = 1, 2
        expected = (weight[8 * i : 8 * i + 8, 4 * j : 4 * j + 4].abs() / weight.std()).mean()
        assert layer.scores["default"][i, j].item() == pytest.approx(expected.item(), rel=1e-5)


def test_pool_and_spread_are_by_blocks():
    matrix = torch.arange(24.0).view(4, 6)
    assert pool(matrix, (2, 3)).tolist() == [[0 + 1 + 2 + 6 + 7 + 8, 3 + 4 + 5 + 9 + 10 + 11], [96, 114]]
    assert torch.equal(spread(torch.tensor([[1, 2]]), (2, 2)), torch.tensor([[1, 1, 2, 2], [1, 1, 2, 2]]))


def test_spellings():
    assert parse_granularity("32x16") == BlockGranularity(32, 16)
    assert parse_granularity("row").block((6, 8)) == (1, 8) and parse_granularity("column").block((6, 8)) == (6, 1)
    assert parse_granularity("2:4") == NMGranularity(2, 4)
    for text in ("0x4", "4x0", "x", "4x", "rows", "4×4", 3, None):
        with pytest.raises(ValueError, match="granularity="):
            parse_granularity(text)


def test_what_cannot_be_is_told():
    with pytest.raises(ValueError, match=r"granularity='5x5' does not divide 'bert.encoder.layer.0.*32x32"):
        get_peft_model(make_bert(), SMPConfig(granularity="5x5"))
    with pytest.raises(
        ValueError, match=r"granularity='head': .*intermediate.dense.*no rows or columns that are heads"
    ):
        get_peft_model(make_bert(), SMPConfig(granularity="head", target_modules="all-linear"))
    with pytest.raises(ValueError, match=r"granularity='head': .*c_attn"):
        get_peft_model(make_gpt2(), SMPConfig(granularity="head", target_modules=["c_attn"]))
    model = get_peft_model(make_bert(), SMPConfig(granularity="row", allocation="global"))
    with pytest.raises(ValueError, match=r"blocks, which here differ in size \(32 to 48 weights\)"):
        update_schedule(model, 10, 10)


def test_heads_of_every_architecture_are_found():
    for name in ("bert", "gpt2", "t5", "llama", "deberta-v2"):
        outputs = [site for site in find_sites(make(name)) if site.kind == HEADS]
        assert outputs and all(site.columns.shape == (site.units, site.width) for site in outputs)
