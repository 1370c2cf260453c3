"""Scores that start where a look at inputs puts them: calibrated before training, and once."""

import logging

import pytest
import torch
from helpers.callbacks import Record
from helpers.data import arguments, data
from helpers.models import logits, make_bert, make_gpt2, make_llama
from peft import PeftModel, get_peft_model
from torch import nn
from transformers import Trainer, TrainerCallback

from peft_prune import (
    MovementPruningConfig,
    PruningCallback,
    PruningTrainer,
    SMPConfig,
    WandaConfig,
    calibrate,
    create_pruning_optimizer,
    finalize,
    update_schedule,
)
from peft_prune.layers.layer import pruning_layers
from peft_prune.training import start


FIELDS = {"task_type": "CAUSAL_LM", "preset": "encoder", "sparsity": 0.5, "score_init": "wanda"}
LOW_RANK = {"score": "low_rank", "score_rank": 3}
AT_ONCE = {"sparsity_schedule": "constant"}


def batches(count=3, length=11):
    generator = torch.Generator().manual_seed(4)
    return [{"input_ids": torch.randint(0, 90, (2, length), generator=generator)} for _ in range(count)]


def llama(base=None, **fields):
    """A model whose scores start at Wanda's."""
    return get_peft_model(base or make_llama(), SMPConfig(**FIELDS | fields))


def inputs_of_layers(model, names, texts):
    """What comes into linear layers of a plain model: (tokens, in) each."""
    seen = {name: [] for name in names}
    handles = [
        model.get_submodule(name).register_forward_pre_hook(
            lambda module, args, name=name: seen[name].append(args[0].flatten(0, -2))
        )
        for name in names
    ]
    with torch.no_grad():
        for batch in texts:
            model(**batch)
    for handle in handles:
        handle.remove()
    return {name: torch.cat(parts) for name, parts in seen.items()}


def masks(model, name="default"):
    return torch.cat([layer.get_mask(name).flatten() for layer in pruning_layers(model, name)])


def by_hand(importance):
    """Logarithms with mean 0 and standard deviation 1 in each row."""
    rows = importance.double().log()
    return (rows - rows.mean(1, keepdim=True)) / rows.std(1, keepdim=True, unbiased=False)


# --------------------------------------------------------------------- where scores start


@pytest.mark.parametrize("make", [make_llama, make_gpt2])
@pytest.mark.parametrize("granularity", ["weight", "4x4", "1x8"])
@pytest.mark.parametrize("kind", ["wanda", "sparsegpt"])
@pytest.mark.parametrize("extra", [{}, LOW_RANK])
def test_scores_start_at_the_ranking_of_the_inputs_of_the_dense_model(make, granularity, kind, extra):
    model = llama(make(), score_init=kind, granularity=granularity, **extra)
    calibrate(model, batches(12))
    layers = {layer.module_name: layer for layer in pruning_layers(model)}
    assert layers
    for name, x in inputs_of_layers(make(), layers, batches(12)).items():
        layer, (height, width) = layers[name], layers[name].block("default")
        if kind == "wanda":
            factors = x.double().square().sum(0).sqrt()
        else:
            gram = x.double().T @ x.double()
            damped = gram + 0.01 * gram.diagonal().mean() * torch.eye(len(gram))
            factors = torch.linalg.inv(damped).diagonal().rsqrt()
        size = layer.matrix.detach().double().abs() * factors
        blocks = size.view(size.shape[0] // height, height, size.shape[1] // width, width).sum((1, 3))
        torch.testing.assert_close(layer.ranking("default").double(), by_hand(blocks), rtol=1e-3, atol=1e-4)
        assert bool(layer.get_mask("default").all()), "the schedule begins dense"


@pytest.mark.parametrize("extra", [{"allocation": "row"}, {"allocation": "row", **LOW_RANK}, {"granularity": "2:4"}])
def test_a_schedule_that_begins_at_the_end_begins_with_the_mask_of_wanda(extra):
    fields = {"granularity": "2:4"} if "granularity" in extra else {"sparsity": 0.5}
    pruned = get_peft_model(make_llama(), WandaConfig(task_type="CAUSAL_LM", refine=None, **fields))
    calibrate(pruned, batches())
    model = llama(**AT_ONCE | extra)
    assert calibrate(model, batches()) == {"sparsity": 0.5}
    assert torch.equal(masks(model), masks(pruned)), "each block behind pruned ones"
    update_schedule(model, 0, 10)
    assert torch.equal(masks(model), masks(pruned))
    assert not model.peft_config["default"].finalized


def test_zeros_start_last_and_padding_does_not_count():
    base = make_llama()
    weight = base.model.layers[0].mlp.up_proj.weight
    with torch.no_grad():
        weight[:, ::3] = 0
        weight[5] = 0
    models = [llama(base, allocation="row", **AT_ONCE), llama(allocation="row")]
    padded = []
    for batch in batches():
        ids = nn.functional.pad(batch["input_ids"], (0, 4), value=7)
        padded.append({"input_ids": ids, "attention_mask": (torch.arange(15) < 11).long().expand(2, -1)})
    calibrate(models[0], batches())
    (layer,) = [m for m in pruning_layers(models[0]) if m.module_name == "model.layers.0.mlp.up_proj"]
    scores, zero = layer.scores["default"].detach(), layer.weight == 0
    assert bool(torch.isfinite(scores).all()) and scores[zero].max() < scores[~zero].min() - 5
    known = torch.arange(48) != 5
    means = scores[known][~zero[known]].view(47, -1).mean(1)
    torch.testing.assert_close(means, torch.zeros(47), atol=1e-5, rtol=0)
    assert not layer.get_mask("default")[zero & known[:, None]].sum()
    calibrate(models[1], padded)
    unpadded = llama(allocation="row")
    calibrate(unpadded, batches())
    for one, two in zip(pruning_layers(models[1]), pruning_layers(unpadded), strict=True):
        torch.testing.assert_close(one.scores["default"], two.scores["default"], rtol=1e-3, atol=1e-3)


def test_the_fixed_part_of_scores_of_low_rank_is_a_number_for_each_input():
    model = llama(make_llama().to(torch.bfloat16), **LOW_RANK)
    calibrate(model, batches())
    for layer in pruning_layers(model):
        sizes = {
            kind: layer.held(kind)["default"].numel()
            for kind in (*layer.trained_names, *layer.stored_names)
            if "default" in layer.held(kind)
        }
        rows, columns = layer.shape
        assert sizes == {
            "scores_A": rows * 4, "scores_B": 4 * columns, "start": columns, "progress": 3, "bits": rows * columns // 8,
        }  # fmt: skip
        before = layer.ranking("default")
        layer.to(torch.bfloat16)  # as users and PEFT cast models; what scores start from is not a float to be cast
        assert layer.held("start")["default"].dtype == torch.int32
        torch.testing.assert_close(layer.ranking("default"), before.to(torch.bfloat16), rtol=0.05, atol=0.05)


@pytest.mark.parametrize("variant", ["hard", "soft"])
def test_movement_pruning_starts_so_too(variant, batch):
    model = get_peft_model(make_bert(), MovementPruningConfig(variant=variant, score_init="wanda"))
    calibrate(model, [batch])
    for layer in pruning_layers(model):
        scores = layer.scores["default"].detach()
        torch.testing.assert_close(scores.std(1, unbiased=False), torch.ones(len(scores)), rtol=1e-3, atol=1e-3)
    update_schedule(model, 10, 10)
    removed = 1 - masks(model).float().mean().item()
    # 0.1 is sigmoid(-2.2): of logarithms of normal weights 4 % are that low
    assert removed == pytest.approx(0.5, abs=1e-3) if variant == "hard" else 0.01 < removed < 0.1


# --------------------------------------------------------------------- before it is known


@pytest.mark.parametrize("extra", [{}, LOW_RANK])
def test_nothing_is_trained_before_the_start_is_known(extra):
    model = llama(**extra)
    batch = batches()[0] | {"labels": batches()[0]["input_ids"]}
    assert torch.equal(logits(model, batch), logits(make_llama(), batch)), "dense until then"
    message = r"score_init='wanda'.*peft_prune\.calibrate\(model, batches\).*score_init='magnitude'"
    for act in (lambda: update_schedule(model, 0, 10), lambda: finalize(model), lambda: model.train()(**batch)):
        with pytest.raises(ValueError, match=message):
            act()
    model.eval()
    with pytest.raises(ValueError, match="needs batches"):
        calibrate(model)
    calibrate(model, batches())
    with pytest.raises(ValueError, match="'default'.* is calibrated already"):
        calibrate(model, batches())
    model.train()(**batch).loss.backward()
    assert update_schedule(model, 10, 10)["sparsity"] == pytest.approx(0.5, abs=1e-3)


@pytest.mark.parametrize("extra", [{}, AT_ONCE])
def test_an_interrupted_start_is_none(extra):
    model = llama(allocation="row", **extra)
    calls = []

    def interrupt(module, args):
        calls.append(module)
        if len(calls) == 3:
            raise KeyboardInterrupt

    handle = pruning_layers(model)[-1].register_forward_pre_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        calibrate(model, batches())
    handle.remove()
    assert bool(masks(model).all())
    with pytest.raises(ValueError, match="score_init='wanda'"):
        update_schedule(model, 0, 10)
    calibrate(model, batches())
    update_schedule(model, 0, 10)


@pytest.mark.parametrize(
    ("make", "fields", "message"),
    [
        (SMPConfig, {"score_init": "ria"}, "score_init='ria' is unknown. Use one of .*'wanda', 'sparsegpt'"),
        (SMPConfig, {"num_samples": 0}, "num_samples=0"),
        (MovementPruningConfig, {"variant": "l0", "score_init": "wanda"}, "score_init='wanda'.*mask='l0'"),
        (MovementPruningConfig, {"variant": "magnitude", "score_init": "wanda"}, "score_init='wanda'.*'magnitude'"),
        (
            MovementPruningConfig,
            {"from_existing_zeros": True, "score_init": "sparsegpt"},
            "score_init='sparsegpt'.*from_existing_zeros=True",
        ),
    ],
)
def test_what_cannot_start_so_is_told(make, fields, message):
    with pytest.raises(ValueError, match=message):
        make(**fields)


def test_layers_whose_inputs_are_not_their_columns_are_told():
    base = nn.Sequential(nn.Embedding(20, 8), nn.Linear(8, 8))
    with pytest.raises(ValueError, match="score_init='wanda' needs the inputs of linear layers, but '0' is not linear"):
        get_peft_model(base, SMPConfig(target_modules=["0", "1"], score_init="wanda"))


def test_random_scores_for_tests_need_no_calibration():
    for extra in ({}, LOW_RANK):
        model = llama(init_weights=False, **extra)
        assert update_schedule(model, 10, 10)["sparsity"] == pytest.approx(0.5, abs=1e-3)


# --------------------------------------------------------------------- files


@pytest.mark.parametrize("extra", [{}, LOW_RANK])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_start_is_saved_and_loaded_and_gone_in_the_end(extra, dtype, tmp_path):
    model = llama(make_llama().to(dtype), allocation="row", **AT_ONCE | extra)
    calibrate(model, batches())
    model.save_pretrained(tmp_path / "started")
    loaded = PeftModel.from_pretrained(make_llama().to(dtype), tmp_path / "started", is_trainable=True)
    assert torch.equal(masks(loaded), masks(model))
    for one, two in zip(pruning_layers(model), pruning_layers(loaded), strict=True):
        assert torch.equal(one.ranking("default"), two.ranking("default"))
    with pytest.raises(ValueError, match="calibrated already"):
        calibrate(loaded, batches())
    train(loaded)
    finalize(loaded)
    assert not [name for name in loaded.state_dict() if "smp_" in name and "smp_mask" not in name]
    loaded.save_pretrained(tmp_path / "final")
    again = PeftModel.from_pretrained(make_llama().to(dtype), tmp_path / "final")
    assert torch.equal(logits(again, batches()[0]), logits(loaded, batches()[0]))


def test_an_adapter_that_waits_is_saved_and_waits(tmp_path):
    llama().save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(make_llama(), tmp_path, is_trainable=True)
    with pytest.raises(ValueError, match="score_init='wanda'"):
        update_schedule(loaded, 0, 10)
    calibrate(loaded, batches())
    update_schedule(loaded, 0, 10)


def train(model, steps=4):
    model.train()
    optimizer = create_pruning_optimizer(model, lr=1e-3)
    update_schedule(model, 0, steps)
    for step in range(steps):
        batch = batches(steps)[step]
        model(**batch, labels=batch["input_ids"]).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        update_schedule(model, step + 1, steps)


def test_two_adapters_one_of_which_waits(batch):
    model = get_peft_model(make_bert(), SMPConfig(sparsity=0.5), "a")
    model.add_adapter("b", SMPConfig(sparsity=0.5, score_init="wanda"))
    update_schedule(model, 0, 10)  # of "a", which is active
    with pytest.raises(ValueError, match="adapter 'b' is not active"):
        calibrate(model, [batch])
    model.set_adapter("b")
    with pytest.raises(ValueError, match="adapter 'b' start at"):
        update_schedule(model, 0, 10)
    calibrate(model, [batch])
    update_schedule(model, 0, 10)


# --------------------------------------------------------------------- trainers


class Batches(TrainerCallback):
    """What training is given."""

    def __init__(self):
        self.seen = []

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        model.register_forward_pre_hook(
            lambda module, args, kwargs: self.seen.append(kwargs["input_ids"].clone()) if module.training else None,
            with_kwargs=True,
        )


def fit(folder, callbacks=(), cls=PruningTrainer, resume=None, config=None, **changes):
    torch.manual_seed(0)
    fields = {"task_type": "SEQ_CLS", "sparsity": 0.6, "score_init": "wanda", "num_samples": 20} | (config or {})
    model = get_peft_model(make_bert(hidden_dropout_prob=0.1), SMPConfig(**fields))
    args = arguments(folder, **{"max_steps": 6} | changes)
    trainer = cls(model=model, args=args, train_dataset=data(), callbacks=[PruningCallback(), *callbacks])
    trainer.train(resume_from_checkpoint=resume)
    return trainer


@pytest.mark.filterwarnings("ignore:The scores are trained at the learning rate")
@pytest.mark.parametrize("cls", [PruningTrainer, Trainer])
def test_a_trainer_calibrates_by_itself_and_trains_on_what_it_would_have(cls, tmp_path, caplog):
    seen, counted = [Batches(), Batches()], []
    original = start.calibrate

    def count(model, given, name):
        counted.extend(len(batch["input_ids"]) for batch in given)
        return original(model, given, name)

    with pytest.MonkeyPatch.context() as patch, caplog.at_level(logging.WARNING):
        patch.setattr(start, "calibrate", count)
        trainer = fit(tmp_path, [seen[0]], cls)
    assert trainer.model.peft_config["default"].finalized and sum(counted) == 20
    assert "calibrating on up to 20 examples of the training data" in caplog.text
    fit(tmp_path, [seen[1]], cls, config={"score_init": "magnitude"})
    assert len(seen[0].seen) == len(seen[1].seen) == 6
    assert all(torch.equal(one, two) for one, two in zip(seen[0].seen, seen[1].seen, strict=True))
    caplog.clear()
    torch.manual_seed(0)
    model = get_peft_model(make_bert(), SMPConfig(task_type="SEQ_CLS", score_init="wanda"))
    calibrate(model, [{"input_ids": torch.tensor(data(8)["input_ids"][:])}])
    cls(model=model, args=arguments(tmp_path), train_dataset=data(), callbacks=[PruningCallback()]).train()
    assert "calibrating" not in caplog.text, "once is enough"


@pytest.mark.parametrize("extra", [{}, {"allocation": "row", **LOW_RANK, **AT_ONCE}])
def test_a_training_that_is_resumed_is_not_calibrated_again(extra, tmp_path, monkeypatch):
    records = [Record(), Record()]
    fit(tmp_path, [records[0]], config=extra, save_strategy="steps", save_steps=3)
    monkeypatch.setattr(start, "calibrate", lambda *args: pytest.fail("calibrated again"))
    fit(tmp_path, [records[1]], config=extra, resume=str(tmp_path / "checkpoint-3"))
    assert [step for step, _ in records[1].steps] == [4, 5, 6]
    for (step, one), (_, two) in zip(records[0].steps[3:], records[1].steps, strict=True):
        assert all(torch.equal(one[name], two[name]) for name in one), step


def test_a_stream_is_calibrated_on_its_first_examples(tmp_path):
    model = get_peft_model(make_bert(), SMPConfig(task_type="SEQ_CLS", score_init="wanda", num_samples=16))
    stream = data().to_iterable_dataset()
    PruningTrainer(model=model, args=arguments(tmp_path, max_steps=3), train_dataset=stream).train()
    expected = get_peft_model(make_bert(), SMPConfig(task_type="SEQ_CLS", score_init="wanda", num_samples=16))
    calibrate(expected, [{name: torch.tensor(data(16)[name][:]) for name in ("input_ids", "attention_mask")}])
    assert model.peft_config["default"].finalized
    agree = (masks(model) == masks(advanced(expected))).float().mean()
    assert agree > 0.97


def advanced(model):
    update_schedule(model, 10, 10)
    return model


@pytest.mark.parametrize("fields", [{}, AT_ONCE, {"score_init": "sparsegpt"}])
def test_blocks_may_be_run_on_a_device_of_their_own(fields):
    models = [llama(allocation="row", **fields) for _ in range(2)]
    calibrate(models[0], batches())
    calibrate(models[1], batches(), device="cpu")
    for one, two in zip(*map(pruning_layers, models), strict=True):
        torch.testing.assert_close(one.ranking("default"), two.ranking("default"), rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match="device='nowhere'"):
        calibrate(llama(), batches(), device="nowhere")
