"""Movement pruning against the papers' formulas written down with autograd."""

import copy
import json
import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from helpers.callbacks import Record
from helpers.data import arguments, data
from helpers.methods import train
from helpers.models import logits, make_bert, make_gpt2, snapshot, sparse_base
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import nn
from transformers.pytorch_utils import Conv1D

from peft_prune import (
    MaskFormatError,
    MovementPruningConfig,
    PruningCallback,
    PruningTrainer,
    SMPConfig,
    create_pruning_optimizer,
    finalize,
    update_schedule,
)
from peft_prune.layers.layer import pruning_layers
from peft_prune.storage.values import decode_values, encode_values, values_size


VARIANTS = ("hard", "soft", "l0", "magnitude")
_GENERATOR = torch.Generator().manual_seed(1)
X, TARGET = torch.randn(3, 5, 32, generator=_GENERATOR), torch.randn(3, 5, 24, generator=_GENERATOR)


def one_layer(conv1d=False, **fields):
    torch.manual_seed(0)
    base = nn.Sequential(Conv1D(24, 32) if conv1d else nn.Linear(32, 24))
    nn.init.normal_(base[0].weight)
    model = get_peft_model(base, MovementPruningConfig(target_modules=["0"], **fields)).train()
    (layer,) = pruning_layers(model)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.copy_(torch.randn_like(parameter))
    weight = layer.get_base_layer().weight.detach().T if conv1d else layer.get_base_layer().weight.detach()
    return model, layer, weight


def reference_loss(layer, weight):
    return F.mse_loss(F.linear(X, weight, layer.get_base_layer().bias.detach()), TARGET)


def trained_copy(layer, name):
    return getattr(layer, name)["default"].detach().clone().requires_grad_()


@pytest.mark.parametrize("conv1d", [False, True])
@pytest.mark.parametrize("granularity", ["weight", "2:4", "8x4", "row", "column"])
def test_gradients_of_topk(conv1d, granularity):
    fields = {} if granularity == "2:4" else {"sparsity": 0.75}
    model, layer, weight = one_layer(conv1d, granularity=granularity, **fields)
    update_schedule(model, 10, 10)
    loss = F.mse_loss(model(X), TARGET)
    loss.backward()

    scores, update = trained_copy(layer, "scores"), trained_copy(layer, "update")
    rows, columns = 24 // scores.shape[0], 32 // scores.shape[1]
    spread = torch.kron(scores, torch.ones(rows, columns))
    mask = layer.get_mask("default").float()
    assert mask.mean() == (0.5 if granularity == "2:4" else 0.25)
    through = mask + spread - spread.detach()  # the mask going forward, the scores going back
    expected = reference_loss(layer, (weight + update) * through)
    # through the product alone the update would get the scores' path, too: it sees the mask
    expected.backward()
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(layer.scores["default"].grad, scores.grad)
    torch.testing.assert_close(layer.update["default"].grad, update.grad)
    assert bool((layer.update["default"].grad[mask == 0] == 0).all()), "a pruned weight gets no gradient"
    assert bool((layer.scores["default"].grad != 0).all()), "but its score does"


def test_the_mask_is_the_top_of_the_blocks():
    model, layer, _ = one_layer(granularity="8x4", sparsity=0.75)
    update_schedule(model, 10, 10)
    scores = layer.scores["default"].detach()
    best = sorted(((float(scores[i, j]), i, j) for i in range(3) for j in range(8)), reverse=True)[:6]
    expected = torch.zeros(24, 32, dtype=torch.bool)
    for _, i, j in best:
        expected[8 * i : 8 * i + 8, 4 * j : 4 * j + 4] = True
    assert torch.equal(layer.get_mask("default"), expected)


@pytest.mark.parametrize("step", [0, 3, 6, 10])
def test_soft_keeps_what_is_above_the_threshold(step):
    model, layer, _ = one_layer(variant="soft", threshold=0.4, schedule_start=0.2, schedule_end=0.8)
    report = update_schedule(model, step, 10)
    share = 0.0 if step < 2 else min(1.0, (step / 10 - 0.2) / 0.6)
    tau = 0.4 * (1 - (1 - share) ** 3)
    expected = torch.sigmoid(layer.scores["default"].detach()) > tau
    assert torch.equal(layer.get_mask("default"), expected)
    assert report["sparsity"] == pytest.approx(1 - expected.float().mean().item())


@pytest.mark.parametrize("step", [0, 3, 6, 10])
def test_soft_moves_its_one_threshold_to_where_the_sparsity_is_reached(step):
    model = get_peft_model(make_bert(), MovementPruningConfig(variant="soft", sparsity=0.8, min_density=0.0))
    layers = pruning_layers(model)
    with torch.no_grad():
        for scale, layer in enumerate(layers):
            layer.scores["default"].normal_().add_(0.1 * scale)
    report = update_schedule(model, step, 10)
    share = 0.0 if step < 1 else 0.8 * (1 - (1 - min(1.0, (step / 10 - 0.1) / 0.6)) ** 3)
    scores = torch.cat([layer.scores["default"].detach().flatten() for layer in layers])
    number = round((1 - share) * len(scores))
    threshold = scores.sort(descending=True).values[number - 1]
    for layer in layers:
        assert torch.equal(layer.get_mask("default"), layer.scores["default"].detach() >= threshold)
    assert report["sparsity"] == pytest.approx(share, abs=1e-4)
    assert len({layer.kept("default") for layer in layers}) > 1 or step == 0


def test_soft_with_a_sparsity_trains_ends_there_and_leaves_a_least_share(tmp_path, batch):
    model = get_peft_model(
        make_bert(), MovementPruningConfig(variant="soft", sparsity=0.8, min_density=0.05, task_type="SEQ_CLS")
    )
    with torch.no_grad():
        pruning_layers(model)[0].scores["default"].sub_(100)
    train(model)
    finalize(model)
    first, *_ = pruning_layers(model)
    assert first.kept("default") == math.ceil(0.05 * first.matrix.numel())
    assert model.peft_config["default"].sparsity == pytest.approx(0.8, abs=0.01)
    model.save_pretrained(tmp_path)
    torch.testing.assert_close(logits(PeftModel.from_pretrained(make_bert(), tmp_path), batch), logits(model, batch))


def test_a_moved_threshold_that_missed_its_sparsity_says_why():
    def ended_at(step, **fields):
        config = MovementPruningConfig(variant="soft", task_type="SEQ_CLS", **fields)
        model = get_peft_model(make_bert(), config)
        update_schedule(model, 0, 10)
        with torch.no_grad():  # nearly all scores of one matrix are above those of the others
            scores = next(p for key, p in model.named_parameters() if "scores" in key)
            scores.add_(100)
        update_schedule(model, step, 10)
        return model

    with pytest.warns(UserWarning, match="not at the 0.8000 asked for: the schedule stands at step 2 of 10"):
        finalize(ended_at(2, sparsity=0.8))
    with pytest.warns(UserWarning, match=r"not at the 0.7900 asked for: min_density=0\.2 keeps .* Lower it"):
        finalize(ended_at(10, sparsity=0.79, min_density=0.2))


def test_a_checkpoint_of_a_moved_threshold_goes_on(tmp_path):
    model = get_peft_model(make_bert(), MovementPruningConfig(variant="soft", sparsity=0.8, task_type="SEQ_CLS"))
    update_schedule(model, 5, 10)
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(make_bert(), tmp_path, is_trainable=True)
    assert update_schedule(again, 6, 10) == update_schedule(model, 6, 10)
    for one, two in zip(pruning_layers(model), pruning_layers(again), strict=True):
        assert torch.equal(one.get_mask("default"), two.get_mask("default"))


def test_random_scores_of_methods_that_find_their_sparsity_prune_half():
    for variant in ("soft", "l0"):
        model = get_peft_model(make_bert(), MovementPruningConfig(variant=variant, init_weights=False))
        assert all(2 * layer.kept("default") == layer.matrix.numel() for layer in pruning_layers(model))


def test_two_random_adapters_differ_without_scores(batch):
    config = {"variant": "magnitude", "init_weights": False, "task_type": "SEQ_CLS"}
    dense = make_bert()
    model = get_peft_model(make_bert(), MovementPruningConfig(**config))
    model.add_adapter("other", MovementPruningConfig(**config))
    one = logits(model, batch)
    model.set_adapter("other")
    two = logits(model, batch)
    assert not any(torch.allclose(a, b, atol=1e-4) for a, b in ((one, two), (one, logits(dense, batch))))


def test_soft_leaves_a_least_share_of_each_matrix():
    model, layer, _ = one_layer(variant="soft", min_density=0.05)
    with torch.no_grad():
        layer.scores["default"].sub_(100)
    update_schedule(model, 10, 10)
    assert int(layer.get_mask("default").sum()) == math.ceil(0.05 * 768)


def hard_concrete(scores, u=None):
    s = torch.sigmoid((torch.log(u) - torch.log(1 - u) + scores) / (2 / 3)) if u is not None else torch.sigmoid(scores)
    return torch.clamp(s * 1.2 - 0.1, 0, 1)


def noise_of(layer):
    """The noise of the gates at the present step."""
    return layer.host["default"].recipe.importance.noise(layer, "default")


def test_l0_gates_noise_and_penalty():
    model, layer, weight = one_layer(variant="l0", seed=3)
    update_schedule(model, 4, 10)
    u = noise_of(layer)
    assert u.shape == (24, 32) and 0 < u.min() and u.max() < 1 and 0.4 < u.mean() < 0.6
    assert torch.equal(u, noise_of(layer)), "one draw a step"
    loss = F.mse_loss(model(X), TARGET)
    loss.backward()

    scores, update = trained_copy(layer, "scores"), trained_copy(layer, "update")
    expected = reference_loss(layer, (weight + update) * hard_concrete(scores, u))
    lambda_now = 125 * (1 - 0.6**3)
    probability = torch.sigmoid(scores - 2 / 3 * math.log(0.1 / 1.1))  # of not being 0
    (expected + lambda_now * probability.mean()).backward()
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(layer.scores["default"].grad, scores.grad)
    torch.testing.assert_close(layer.update["default"].grad, update.grad)

    update_schedule(model, 5, 10)
    assert not torch.equal(noise_of(layer), u)
    model.eval()
    with torch.no_grad():
        gates = hard_concrete(scores.detach())
        out = F.linear(X, (weight + update.detach()) * gates, layer.get_base_layer().bias.detach())
    torch.testing.assert_close(model(X), out), "no noise after training"
    assert torch.equal(layer.get_mask("default"), gates > 0)
    finalize(model)
    torch.testing.assert_close(model(X), out)


def test_noise_is_that_of_the_seed_and_the_layer():
    noise = []
    for seed in (0, 0, 1):
        model = get_peft_model(make_bert(), MovementPruningConfig(variant="l0", seed=seed)).train()
        update_schedule(model, 0, 10)
        noise.append([noise_of(layer) for layer in pruning_layers(model)])
    assert all(torch.equal(a, b) for a, b in zip(noise[0], noise[1], strict=True))
    assert not torch.equal(noise[0][0], noise[2][0]) and not torch.equal(noise[0][0], noise[0][1])


def test_magnitude_follows_the_weights_as_they_are_trained():
    model, layer, weight = one_layer(variant="magnitude", sparsity=0.7)
    assert not layer.scores
    for step in (8, 9, 10):
        update_schedule(model, step, 10)
        values = (weight + layer.update["default"].detach()).abs()
        kept = round(0.3 * 768)
        expected = values >= values.flatten().sort(descending=True).values[kept - 1]
        assert torch.equal(layer.get_mask("default"), expected)
        with torch.no_grad():
            layer.update["default"].add_(torch.randn(24, 32))


@pytest.mark.parametrize("variant", VARIANTS)
def test_base_stays_and_merging_is_bit_exact(variant, batch):
    base = make_bert()
    before = snapshot(base)
    dense = logits(base, batch)
    fields = {"sparsity": 0.6} if variant in ("hard", "magnitude") else {}
    model = get_peft_model(base, MovementPruningConfig(variant=variant, task_type="SEQ_CLS", **fields))
    train(model)
    live = logits(model, batch)
    assert not torch.allclose(live, dense)
    finalize(model)
    torch.testing.assert_close(logits(model, batch), live, atol=1e-6, rtol=1e-5)
    classifier = model.base_model.model.classifier
    with model.disable_adapter():
        assert torch.equal(logits(model, batch), dense)
    model.merge_adapter()
    torch.testing.assert_close(logits(model, batch), live, atol=1e-6, rtol=1e-5)
    model.unmerge_adapter()
    after = {name.replace(".base_layer", ""): value for name, value in snapshot(base).items()}
    for name, value in before.items():
        if not name.startswith("classifier"):
            assert torch.equal(after[name], value), name
    assert classifier is not None
    merged = model.merge_and_unload()
    torch.testing.assert_close(logits(merged, batch), live, atol=1e-6, rtol=1e-5)
    zeros = (merged.bert.encoder.layer[0].intermediate.dense.weight == 0).float().mean().item()
    assert zeros > 0.55 or variant in ("soft", "l0")


def test_weights_return():
    """A weight that was removed comes back with the values that its update has."""
    model, layer, weight = one_layer(sparsity=0.5)
    update_schedule(model, 10, 10)
    gone = ~layer.get_mask("default")
    with torch.no_grad():
        layer.scores["default"][gone] += 100
    update_schedule(model, 10, 10)
    assert bool(layer.get_mask("default")[gone].float().mean() > 0.9)
    model.eval()
    finalize(model)
    effective = layer.effective_weight(weight)
    kept = layer.get_mask("default")
    assert bool((effective[kept] != weight[kept]).all()) and bool((effective[~kept] == 0).all())


def test_update_none_is_smp(batch):
    """Scores of hard movement over frozen weights are those of SMP-L, step by step."""
    fields = {"sparsity": 0.6, "score_init": "zeros", "score_lr": 1e-2, "schedule_start": 0.0, "schedule_end": 0.6}
    movement = get_peft_model(make_bert(), MovementPruningConfig(variant="hard", update="none", **fields))
    smp = get_peft_model(make_bert(), SMPConfig(penalty=0.0, **fields))
    for model in (movement, smp):
        train(model)
    for one, two in zip(pruning_layers(movement), pruning_layers(smp), strict=True):
        assert torch.equal(one.scores["default"], two.scores["default"])
        assert torch.equal(one.get_mask("default"), two.get_mask("default"))
        assert not one.update
    finalize(movement)
    assert torch.equal(logits(movement, batch), logits(smp, batch))
    assert not any(layer.values for layer in pruning_layers(movement)), "a mask and nothing else"


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16", "int8"])
@pytest.mark.parametrize("make", [make_bert, make_gpt2])
def test_values_are_stored_and_loaded(dtype, make, tmp_path, batch):
    model = get_peft_model(make(), MovementPruningConfig(sparsity=0.8, value_dtype=dtype))
    update_schedule(model, 10, 10)
    with torch.no_grad():
        for layer in pruning_layers(model):
            layer.update["default"].normal_(0, 0.1)
            layer.scores["default"].normal_()
    wanted = {layer.module_name: layer.adapted("default", layer.matrix).detach() for layer in pruning_layers(model)}
    live = logits(model.eval(), batch)
    finalize(model)
    stored = logits(model, batch)
    tolerance = {"float32": 0.0, "float16": 1e-2, "bfloat16": 3e-2, "int8": 5e-2}[dtype]
    torch.testing.assert_close(stored, live, atol=tolerance * float(live.abs().max()) + 1e-6, rtol=0)
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    bytes_of_values = sum(v.numel() for k, v in tensors.items() if k.endswith("movement_values"))
    kept = sum(layer.kept("default") for layer in pruning_layers(model))
    rows = sum(layer.shape[0] for layer in pruning_layers(model))
    each = {"float32": 4, "float16": 2, "bfloat16": 2, "int8": 1}[dtype]
    assert bytes_of_values == kept * each + (4 * rows if dtype == "int8" else 0)
    assert not [key for key in tensors if "scores" in key or "update" in key]

    again = PeftModel.from_pretrained(make(), tmp_path)
    assert torch.equal(logits(again, batch), stored)
    for layer in pruning_layers(again):
        found, value = layer.adapted("default", layer.matrix), wanted[layer.module_name]
        if dtype == "int8":  # by the definition of a scale for each row
            scale = value.abs().amax(1, keepdim=True) / 127
            value = torch.where(scale > 0, (value / scale).round() * scale, value)
        elif dtype != "float32":
            value = value.to(getattr(torch, dtype)).float()
        torch.testing.assert_close(found, value, atol=1e-7, rtol=1e-6)


def test_the_base_is_needed_only_outside_the_targets(tmp_path, batch):
    model = train(get_peft_model(make_bert(), MovementPruningConfig(task_type="SEQ_CLS", sparsity=0.7)))
    finalize(model)
    model.save_pretrained(tmp_path)
    other = make_bert()
    for block in other.bert.encoder.layer:
        for module in block.modules():
            if isinstance(module, nn.Linear):
                nn.init.zeros_(module.weight)
    with pytest.raises(MaskFormatError, match="another base"):
        PeftModel.from_pretrained(copy.deepcopy(other), tmp_path)
    config = MovementPruningConfig.from_pretrained(tmp_path)
    config.check_base = False
    again = PeftModel.from_pretrained(other, tmp_path, config=config)
    torch.testing.assert_close(logits(again, batch), logits(model, batch))


def test_transformers_own_road(tmp_path, batch):
    model = train(get_peft_model(make_bert(), MovementPruningConfig(sparsity=0.7, value_dtype="int8")))
    finalize(model)
    model.save_pretrained(tmp_path)
    again = make_bert()
    again.load_adapter(str(tmp_path))
    assert torch.equal(logits(again.eval(), batch), logits(model, batch))


def test_two_adapters_on_one_base(batch):
    model = get_peft_model(make_bert(), MovementPruningConfig(sparsity=0.7))
    model.add_adapter("other", MovementPruningConfig(variant="magnitude", sparsity=0.5))
    train(model)
    finalize(model)
    one = logits(model, batch)
    model.set_adapter("other")
    train(model)
    finalize(model)
    two = logits(model, batch)
    assert not torch.allclose(one, two)
    with torch.no_grad():
        mixed = model(batch["input_ids"], adapter_names=["default", "other", "__base__", "default"]).logits
    torch.testing.assert_close(mixed[[0, 1, 3]], torch.stack([one[0], two[1], one[3]]), atol=1e-6, rtol=1e-5)
    model.base_model.set_adapter(["default", "other"])
    with pytest.raises(ValueError, match=r"active together.*set_adapter\('default'\)"):
        logits(model, batch)
    with pytest.raises(ValueError, match="weights of its own, which cannot be combined"):
        model.base_model.add_weighted_adapter(["default", "other"])


def test_a_dense_base_has_no_zeros_to_keep():
    with pytest.raises(ValueError, match="none of the .* target matrices has a zero"):
        get_peft_model(make_bert(), MovementPruningConfig(from_existing_zeros=True))


def test_a_sparse_checkpoint_keeps_its_zeros(tmp_path, batch):
    base = sparse_base()
    zeros = {name: p == 0 for name, p in snapshot(base).items()}
    model = get_peft_model(base, MovementPruningConfig(from_existing_zeros=True))
    train(model)
    live = logits(model, batch)
    assert not torch.allclose(live, logits(sparse_base(), batch)), "something was learned"
    finalize(model)
    assert model.peft_config["default"].sparsity == pytest.approx(0.7, abs=0.02)
    model.save_pretrained(tmp_path)
    merged = PeftModel.from_pretrained(sparse_base(), tmp_path).merge_and_unload()
    torch.testing.assert_close(logits(merged, batch), live, atol=1e-6, rtol=1e-5)
    for name, value in merged.named_parameters():
        if name.endswith("weight") and "encoder.layer" in name and "LayerNorm" not in name:
            assert bool((value[zeros[name]] == 0).all()) and bool((value != 0).float().mean() > 0.25)


def test_defaults_learn_in_few_steps():
    learns = {"score_init": "magnitude", "score_lr": 1e-2, "penalty": 0.0, "schedule_start": 0.1, "schedule_end": 0.7}
    for fields in ({"variant": "hard"}, {"variant": "soft", "sparsity": 0.9}, {"variant": "soft", "density": 0.1}):
        config = MovementPruningConfig(**fields)
        assert {name: getattr(config, name) for name in learns} == learns
        assert MovementPruningConfig(**config.to_dict()).to_dict() == config.to_dict()
        assert replace(config, seed=3).recipe() == config.recipe()
    assert MovementPruningConfig(variant="magnitude").schedule_end == 0.7
    assert MovementPruningConfig(score_init="zeros", score_lr=1.0, schedule_end=0.9).schedule_end == 0.9
    for variant in ("soft", "l0"):  # without a sparsity the penalty decides, as in the paper
        config = MovementPruningConfig(variant=variant)
        paper = MovementPruningConfig(variant=variant, preset="paper")
        assert config == replace(paper, preset="auto") and config.sparsity == 0.0


def test_a_file_from_before_there_was_a_preset_is_the_papers(tmp_path):
    MovementPruningConfig(variant="soft", preset="paper", score_lr=0.5).save_pretrained(tmp_path)
    file = tmp_path / "adapter_config.json"
    stored = json.loads(file.read_text())
    del stored["preset"], stored["checksums"]
    file.write_text(json.dumps(stored))
    loaded = MovementPruningConfig.from_pretrained(tmp_path)
    assert loaded == MovementPruningConfig(variant="soft", preset="paper", score_lr=0.5)


def test_presets_are_the_papers():
    expected = {
        "hard": ("movement", "topk", 0.0, "zeros", 1e-2),
        "soft": ("movement", "threshold", 400.0, "zeros", 1e-2),
        "l0": ("movement", "l0", 125.0, 2.197, 1e-1),
        "magnitude": ("magnitude", "topk", 0.0, "zeros", 1e-2),
    }
    for variant, fields in expected.items():
        config = MovementPruningConfig(variant=variant, preset="paper")
        assert (config.sparsity_schedule, config.schedule_start, config.schedule_end) == ("cubic", 0.1, 0.8)
        assert (config.score, config.mask, config.penalty, config.score_init, config.score_lr) == fields
    assert MovementPruningConfig(variant="soft", penalty=10.0).penalty == 10.0
    assert not MovementPruningConfig(score="magnitude").recipe().importance.tensors
    assert MovementPruningConfig(variant="soft", from_existing_zeros=True).penalty == 0.0


BAD = [
    ({"variant": "mild"}, "'hard', 'soft', 'l0', 'magnitude'"),
    ({"score": "taylor"}, "score='taylor'"),
    ({"mask": "sigmoid"}, "'topk', 'threshold', 'l0'"),
    ({"variant": "soft", "sparsity": 0.9, "preset": "paper"}, "the penalty decides.*preset='auto'"),
    ({"variant": "soft", "density": 0.1, "preset": "paper"}, "the penalty decides"),
    ({"variant": "l0", "sparsity": 0.9}, "the penalty decides"),
    ({"variant": "soft", "sparsity": 0.9, "threshold": 0.3}, r"threshold=0\.3 has no effect with sparsity=0\.9"),
    ({"variant": "soft", "sparsity": 0.999}, r"sparsity=0\.999 cannot be reached with min_density=0\.005.*Use"),
    ({"preset": "encoder"}, "preset='encoder'.*'auto', 'paper'"),
    ({"variant": "l0", "density": 0.1}, "density=0.1 cannot be set"),
    ({"from_existing_zeros": True, "sparsity": 0.5}, "the zeros of the base decide"),
    ({"score": "magnitude", "mask": "threshold"}, "needs learned scores"),
    ({"update": "none", "score": "magnitude"}, "update='none'"),
    ({"update": "none", "variant": "l0"}, "update='none'"),
    ({"value_dtype": "int4"}, "value_dtype='int4'"),
    ({"update": "low_rank", "value_dtype": "int8"}, "value_dtype='int8' has no effect with update='low_rank'.*Leave"),
    ({"update": "none", "value_dtype": "float16"}, "value_dtype='float16' has no effect with update='none'"),
    ({"threshold": 1.0}, "threshold=1.0"),
    ({"min_density": -0.1}, "min_density=-0.1"),
    ({"variant": "soft", "granularity": "2:4"}, "granularity='2:4'"),
    ({"variant": "soft", "allocation": "global"}, "allocation='global'"),
    ({"seed": "a"}, "seed='a' must be a whole number"),
    ({"from_existing_zeros": "no"}, "from_existing_zeros='no' must be True or False"),
    ({"from_existing_zeros": True, "penalty": 10.0}, "penalty=10.0 has no effect with from_existing_zeros=True"),
    ({"variant": "magnitude", "penalty": 10.0}, "penalty=10.0 has no effect with score='magnitude'"),
]


@pytest.mark.parametrize(("fields", "message"), BAD, ids=[str(fields) for fields, _ in BAD])
def test_bad_fields_are_told(fields, message):
    with pytest.raises(ValueError, match=message):
        MovementPruningConfig(**fields)


def test_value_codec():
    generator = torch.Generator().manual_seed(0)
    matrix, mask = torch.randn(7, 9, generator=generator), torch.rand(7, 9, generator=generator) < 0.4
    mask[3] = False  # a row without values
    for dtype in ("float32", "float16", "bfloat16", "int8"):
        stored = encode_values(matrix, mask, dtype)
        assert stored.dtype == torch.uint8 and stored.numel() == values_size(int(mask.sum()), 7, dtype)
        found = decode_values(stored, mask, dtype)
        assert bool((found[~mask] == 0).all())
        torch.testing.assert_close(found[mask], matrix[mask], atol=0.02, rtol=0.01)
        with pytest.raises(ValueError, match="bytes, not"):
            decode_values(stored[:-1], mask, dtype)
    with pytest.raises(ValueError, match="not finite in float16"):
        encode_values(matrix * 1e6, mask, "float16")
    bad = encode_values(matrix, mask, "float32").view(torch.float32).clone()
    bad[0] = float("nan")
    with pytest.raises(ValueError, match="not finite"):
        decode_values(bad.view(torch.uint8), mask, "float32")
    empty = torch.zeros_like(mask)
    assert bool((decode_values(encode_values(matrix, empty, "int8"), empty, "int8") == 0).all())


@pytest.mark.parametrize("variant", VARIANTS)
def test_trainer_trains_resumes_and_finalizes(variant, tmp_path):
    """A run resumed half way ends like one that was not stopped; distilled, with gradient accumulation."""

    def run(folder, resume=None):
        torch.manual_seed(0)
        fields = {"sparsity": 0.8} if variant in ("hard", "magnitude") else {}
        model = get_peft_model(make_bert(), MovementPruningConfig(variant=variant, task_type="SEQ_CLS", **fields))
        record = Record()
        args = arguments(folder, save_strategy="steps", save_steps=4, gradient_accumulation_steps=2, max_steps=8)
        trainer = PruningTrainer(
            model=model, args=args, train_dataset=data(), teacher=make_bert(seed=1),
            callbacks=[PruningCallback(), record],
        )  # fmt: skip
        trainer.train(resume_from_checkpoint=resume)
        return model, record, trainer

    whole, whole_record, trainer = run(tmp_path / "whole")
    resumed, resumed_record, _ = run(tmp_path / "resumed", str(tmp_path / "whole" / "checkpoint-4"))
    for (_, one), (_, two) in zip(whole_record.steps[4:], resumed_record.steps, strict=True):
        assert all(torch.equal(one[name], two[name]) for name in one)
    one, two = whole.state_dict(), resumed.state_dict()
    assert one.keys() == two.keys() and all(torch.equal(one[key], two[key]) for key in one)
    assert whole.peft_config["default"].finalized and all(layer.values for layer in pruning_layers(whole))
    assert any("sparsity" in entry for entry in trainer.state.log_history)
    if variant in ("hard", "magnitude"):
        assert trainer.state.log_history[-2]["sparsity"] == pytest.approx(0.8, abs=1e-3)


def test_each_kind_of_parameter_has_its_learning_rate():
    model = get_peft_model(make_bert(), MovementPruningConfig(task_type="SEQ_CLS"))
    optimizer = create_pruning_optimizer(model, lr=3e-5, weight_decay=0.1)
    rates = {id(p): (g["lr"], g["weight_decay"]) for g in optimizer.param_groups for p in g["params"]}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            decayed = name.endswith("classifier.modules_to_save.default.weight")
            expected = (1e-2, 0.0) if "movement_scores" in name else (3e-5, 0.1 if decayed else 0.0)
            assert rates[id(parameter)] == expected, name


@pytest.mark.parametrize("variant", VARIANTS)
def test_configs_survive_files_and_replace(variant, tmp_path):
    config = MovementPruningConfig(variant=variant, task_type="SEQ_CLS")
    assert replace(config, seed=1).seed == 1
    model = train(get_peft_model(make_bert(), config), steps=3)
    with pytest.warns(UserWarning, match="saved with its scores"):
        model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(make_bert(), tmp_path, is_trainable=True)
    one, two = pruning_layers(model)[0], pruning_layers(again)[0]
    assert torch.equal(one.update["default"], two.update["default"])
    assert torch.equal(one.get_mask("default"), two.get_mask("default"))
    train(again)
