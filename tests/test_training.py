"""Training: schedule, penalty, optimizer, callback, resume; and everything that nobody should have to find out."""

import warnings

import pytest
import torch
from helpers.callbacks import Gradients, Record
from helpers.data import arguments, data
from helpers.methods import prune, randomize_scores, smp_bert
from helpers.models import logits, make_bert, make_gpt2, snapshot
from helpers.versions import needs_adapters_of_transformers
from peft import PeftModel, get_peft_model, inject_adapter_in_model
from torch import nn
from transformers import Trainer

from peft_prune import (
    DSEEConfig,
    PruningCallback,
    PruningTrainer,
    SMPConfig,
    create_pruning_optimizer,
    finalize,
    penalty,
    update_schedule,
)
from peft_prune.layers.layer import pruning_layers
from peft_prune.stages.schedule import sparsity


@pytest.mark.parametrize("allocation", ["local", "score", "global"])
def test_trainer_with_the_callback_is_exact_at_every_step(tmp_path, allocation):
    model = smp_bert(allocation=allocation)
    base_before = {k: v for k, v in snapshot(model).items() if "base_layer" in k or "embeddings" in k}
    record = Record()
    trainer = Trainer(
        model=model, args=arguments(tmp_path), train_dataset=data(), callbacks=[PruningCallback(), record]
    )
    trainer.train()

    n = {layer.module_name: layer.shape[0] * layer.shape[1] for layer in pruning_layers(model)}
    assert [step for step, _ in record.steps] == list(range(1, 11))
    for step, masks in record.steps:
        density = 0.1 + 0.9 * (1 - min(step / 6, 1)) ** 3
        kept = {name: int(mask.sum()) for name, mask in masks.items()}
        if allocation == "local":
            assert kept == {name: round(density * size) for name, size in n.items()}
        else:
            assert abs(sum(kept.values()) - density * sum(n.values())) <= (0.5 if allocation == "global" else 3)
    assert model.peft_config["default"].finalized
    final = record.steps[-1][1]
    assert all(torch.equal(m.get_mask("default"), final[m.module_name]) for m in pruning_layers(model))

    after = snapshot(model)
    assert base_before and all(torch.equal(tensor, after[key]) for key, tensor in base_before.items())
    logged = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert logged[-1]["sparsity"] == pytest.approx(0.9, abs=1e-3) and logged[-1]["penalty_lambda"] == 400
    assert all(earlier["sparsity"] <= later["sparsity"] for earlier, later in zip(logged, logged[1:], strict=False))


def test_plain_loop_equals_the_trainer(tmp_path):
    """The same steps by hand: an optimizer and `update_schedule`, nothing else."""
    examples = data(8)
    by_trainer = smp_bert()
    args = arguments(tmp_path, lr_scheduler_type="constant", max_grad_norm=0.0)
    PruningTrainer(model=by_trainer, args=args, train_dataset=examples).train()

    by_hand = smp_bert()
    optimizer = create_pruning_optimizer(by_hand, lr=1e-3)
    inputs = {name: torch.tensor(examples[name][:]) for name in examples.column_names}
    by_hand.train()
    update_schedule(by_hand, 0, 10)
    for step in range(10):
        # the whole data set is one batch; its order does not matter but for rounding
        by_hand(**inputs).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        update_schedule(by_hand, step + 1)
    finalize(by_hand)
    same = [
        (a.get_mask("default") == b.get_mask("default")).float().mean().item()
        for a, b in zip(pruning_layers(by_trainer), pruning_layers(by_hand), strict=True)
    ]
    assert min(same) > 0.97


@pytest.mark.parametrize(("curve", "penalties"), [("linear", [0, 20, 50, 80, 100]), ("constant", [100] * 5)])
def test_schedules_are_those_of_the_config(curve, penalties):
    fields = {"sparsity_schedule": "linear", "schedule_start": 0.2, "schedule_end": 0.8, "initial_sparsity": 0.2}
    model = smp_bert(sparsity=0.8, penalty=100.0, penalty_schedule=curve, **fields)
    for step, wanted, penalty_lambda in zip((0, 2, 5, 8, 10), (0.2, 0.2, 0.5, 0.8, 0.8), penalties, strict=True):
        report = update_schedule(model, step, 10)
        assert report["sparsity"] == pytest.approx(wanted, abs=1e-3)
        assert report["penalty_lambda"] == pytest.approx(penalty_lambda)


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_score_allocation_has_the_temperature_of_the_config(temperature):
    model = smp_bert(allocation="score", allocation_temperature=temperature)
    randomize_scores(model)
    queries = [layer for layer in pruning_layers(model) if layer.module_name.endswith("query")]
    with torch.no_grad():
        queries[0].scores["default"].add_(2.0)
    update_schedule(model, 10, 10)
    means = [torch.sigmoid(layer.scores["default"].detach() / temperature).mean().item() for layer in queries]
    kept = [layer.kept("default") for layer in queries]
    assert sum(kept) == round(0.1 * 2 * 32 * 32)
    assert kept[0] == pytest.approx(sum(kept) * means[0] / sum(means), abs=1)


def gradients(model, batches, divide):
    """Gradients of one optimizer step over some micro-batches, as a Trainer accumulates them."""
    model.train()
    update_schedule(model, 5, 10)
    for inputs in batches:
        (model(**inputs).loss / divide).backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def test_penalty_is_counted_once_under_accumulation():
    examples = {k: torch.tensor(v[:]) for k, v in data(32).to_dict().items()}
    parts = [{k: v[i : i + 8] for k, v in examples.items()} for i in range(0, 32, 8)]
    results = []
    for batches in ([examples], parts):
        model = smp_bert(penalty=400.0)
        randomize_scores(model)
        results.append(gradients(model, batches, len(batches)))
    one, four = results
    assert one.keys() == four.keys()
    for name in one:
        torch.testing.assert_close(one[name], four[name], rtol=1e-4, atol=1e-7)
    without = smp_bert(penalty=0.0)
    randomize_scores(without)
    bare = gradients(without, [examples], 1)
    scores = next(name for name in one if "smp_scores" in name)
    assert (one[scores] - bare[scores]).abs().min() > 1e-5


@pytest.mark.parametrize("trainer_cls", [Trainer, PruningTrainer])
def test_trainer_gives_the_same_masks_with_accumulation(tmp_path, trainer_cls):
    """1 × 32 and 4 × 8 through the whole Trainer."""
    masks = []
    for batch_size, accumulation in ((32, 1), (8, 4)):
        model = smp_bert(penalty=400.0, sparsity=0.5)
        args = arguments(
            tmp_path,
            per_device_train_batch_size=batch_size,
            gradient_accumulation_steps=accumulation,
            max_steps=6,
            max_grad_norm=0.0,
        )
        trainer_cls(model=model, args=args, train_dataset=data(32), callbacks=[PruningCallback()]).train()
        masks.append(torch.cat([m.get_mask("default").reshape(-1) for m in pruning_layers(model)]))
    assert (masks[0] == masks[1]).float().mean() > 0.99


@pytest.mark.parametrize("distilled", [False, True])
@pytest.mark.parametrize("penalty_lambda", [0.0, 400.0])
def test_trainer_gives_the_same_gradient_with_accumulation(tmp_path, distilled, penalty_lambda):
    seen = []
    for batch_size, accumulation in ((32, 1), (8, 4)):
        args = arguments(
            tmp_path,
            per_device_train_batch_size=batch_size,
            gradient_accumulation_steps=accumulation,
            max_steps=2,
            max_grad_norm=0.0,
            learning_rate=0.0,
        )
        gradients = Gradients()
        trainer = PruningTrainer(
            model=smp_bert(sparsity=0.5, penalty=penalty_lambda),
            args=args,
            train_dataset=data(32),
            teacher=make_bert(seed=7) if distilled else None,
            score_lr=0.0,
            callbacks=[PruningCallback(), gradients],
        )
        trainer.train()
        seen.append(gradients.seen)
    one, four = seen
    assert one.keys() == four.keys() and any("classifier" in name for name in one)
    for name in one:
        torch.testing.assert_close(four[name], one[name], rtol=1e-3, atol=1e-3 * one[name].abs().max().item())


def test_fp16_loss_scaling_scales_the_penalty_too():
    examples = {k: torch.tensor(v[:]) for k, v in data(8).to_dict().items()}
    seen = []
    for scale in (1.0, 1024.0):
        model = smp_bert(penalty=400.0)
        model.train()
        scaler = type("Scaler", (), {"get_scale": lambda self, scale=scale: scale})()
        optimizer = type("Optimizer", (), {"scaler": scaler})()
        update_schedule(model, 5, 10, PruningCallback()._grad_scale(optimizer))
        (model(**examples).loss * scale).backward()
        seen.append([layer.scores["default"].grad / scale for layer in pruning_layers(model)])
    for plain, scaled in zip(*seen, strict=True):
        torch.testing.assert_close(plain, scaled)


def test_finalize_changes_nothing_if_scores_cannot_be_ranked():
    model = smp_bert()
    update_schedule(model, 10, 10)
    last = pruning_layers(model)[-1]
    with torch.no_grad():
        last.scores["default"].fill_(float("nan"))
    with pytest.raises(ValueError, match="NaN"):
        finalize(model)
    assert all("default" in layer.scores for layer in pruning_layers(model))


def test_optimizer_groups(tmp_path):
    model = smp_bert(modules_to_save=["pooler"], score_lr=0.03)
    optimizer = create_pruning_optimizer(model, lr=1e-4, weight_decay=0.1)
    names = {id(p): name for name, p in model.named_parameters()}
    groups = {group["lr"]: group for group in optimizer.param_groups if group["weight_decay"] == 0}
    assert {names[id(p)].split(".")[-2] for p in groups[0.03]["params"]} == {"smp_scores"}
    assert all("bias" in names[id(p)] for p in groups[1e-4]["params"])
    decayed = next(group for group in optimizer.param_groups if group["weight_decay"] == 0.1)
    assert all(names[id(p)].endswith("weight") and "smp_scores" not in names[id(p)] for p in decayed["params"])
    grouped = [id(p) for group in optimizer.param_groups for p in group["params"]]
    assert sorted(grouped) == sorted(id(p) for p in model.parameters() if p.requires_grad)
    trainer = PruningTrainer(model=model, args=arguments(tmp_path), train_dataset=data(), score_lr=0.5)
    assert trainer.create_optimizer().param_groups[-1]["lr"] == 0.5


def test_resume_is_bit_exact(tmp_path):
    def run(folder, **changes):
        torch.manual_seed(0)
        model = smp_bert(allocation="score", modules_to_save=["pooler"])
        resume = changes.pop("resume", None)
        args = arguments(folder, save_strategy="steps", save_steps=4, **changes)
        record = Record()
        trainer = PruningTrainer(model=model, args=args, train_dataset=data(), callbacks=[PruningCallback(), record])
        trainer.train(resume_from_checkpoint=resume)
        return model, record

    whole, whole_record = run(tmp_path / "whole")
    checkpoint = tmp_path / "whole" / "checkpoint-4"
    resumed, resumed_record = run(tmp_path / "resumed", resume=str(checkpoint))
    assert [step for step, _ in resumed_record.steps] == [5, 6, 7, 8, 9, 10]
    for (_, one), (_, two) in zip(whole_record.steps[4:], resumed_record.steps, strict=True):
        assert all(torch.equal(one[name], two[name]) for name in one)
    one, two = whole.state_dict(), resumed.state_dict()
    assert one.keys() == two.keys() and all(torch.equal(one[key], two[key]) for key in one)

    loaded = PeftModel.from_pretrained(make_bert(), checkpoint)
    layer = pruning_layers(loaded)[0]
    assert layer.progress["default"][:2].tolist() == [4, 10]
    kept = whole_record.steps[3][1][layer.module_name]
    assert torch.equal(layer.get_mask("default"), kept)


def test_checkpoints_do_not_warn_and_finished_adapters_are_final(tmp_path):
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*saved with its scores")
        args = arguments(tmp_path, save_strategy="steps", save_steps=5)
        trainer = PruningTrainer(model=smp_bert(), args=args, train_dataset=data())
        trainer.train()
        trainer.save_model(str(tmp_path / "final"))
    loaded = PeftModel.from_pretrained(make_bert(), tmp_path / "final")
    assert loaded.peft_config["default"].finalized


def test_best_model_is_one_at_the_final_sparsity(tmp_path):
    args = arguments(
        tmp_path,
        eval_strategy="steps",
        eval_steps=2,
        save_strategy="steps",
        save_steps=2,
        load_best_model_at_end=True,
        metric_for_best_model="fake",
        greater_is_better=False,  # the earliest, densest model looks best
    )
    trainer = PruningTrainer(model=smp_bert(), args=args, train_dataset=data(), eval_dataset=data(8))
    evaluate = trainer.evaluate
    trainer.evaluate = lambda *a, **k: evaluate(*a, **k) | {"eval_fake": float(trainer.state.global_step)}
    trainer.train()
    assert trainer.state.best_model_checkpoint.endswith("checkpoint-6")
    layers = pruning_layers(trainer.model)
    assert sparsity(layers, "default") == pytest.approx(0.9, abs=1e-3)
    best = PeftModel.from_pretrained(make_bert(), tmp_path / "checkpoint-6")
    for one, two in zip(layers, pruning_layers(best), strict=True):
        assert torch.equal(one.get_mask("default"), two.get_mask("default"))


@pytest.mark.parametrize(
    "config, first",
    [
        (DSEEConfig(task_type="SEQ_CLS", sparsity=0.5, prune_at=0.9, r=2, num_sparse=4), 9),
        (SMPConfig(task_type="SEQ_CLS", sparsity=0.5, mask_interval=4), 8),
        (SMPConfig(task_type="SEQ_CLS", sparsity=0.5, sparsity_schedule="constant"), 1),
    ],
)
def test_best_model_is_as_sparse_as_it_gets(tmp_path, config, first):
    changes = {
        f"{what}_{how}": value for what in ("eval", "save") for how, value in (("strategy", "steps"), ("steps", 1))
    }
    args = arguments(
        tmp_path, load_best_model_at_end=True, metric_for_best_model="fake", greater_is_better=False, **changes
    )
    trainer = PruningTrainer(
        model=get_peft_model(make_bert(), config), args=args, train_dataset=data(), eval_dataset=data(8)
    )
    evaluate = trainer.evaluate
    trainer.evaluate = lambda *a, **k: evaluate(*a, **k) | {"eval_fake": float(trainer.state.global_step)}
    trainer.train()
    assert trainer.state.best_model_checkpoint.endswith(f"checkpoint-{first}")
    assert sparsity(pruning_layers(trainer.model), "default") == pytest.approx(0.5, abs=1e-3)


@pytest.mark.parametrize("total", [1, 3, 10, 49, 100, 1000])
@pytest.mark.parametrize("end", [0.1, 0.29, 0.55, 0.6, 0.7, 1.0])
def test_the_final_step_is_the_first_of_the_final_sparsity(total, end):
    config = SMPConfig(sparsity=0.5, schedule_end=end)
    schedule = config.sparsity_schedule_for(0.5)
    first = next(step for step in range(total + 1) if schedule.at(step, total) == 0.5)
    assert config.final_step(total) == first


def test_the_learning_rate_of_an_optimizer_class_is_used(tmp_path):
    given = (torch.optim.SGD, {"lr": 0.25})
    trainer = PruningTrainer(
        model=smp_bert(), args=arguments(tmp_path), train_dataset=data(), optimizer_cls_and_kwargs=given
    )
    assert [group["lr"] for group in trainer.create_optimizer().param_groups] == [0.25, 0.25, 2e-2]


def test_a_teacher_that_is_the_student_is_told(tmp_path):
    base = make_bert()
    model = get_peft_model(base, SMPConfig(task_type="SEQ_CLS", sparsity=0.5))
    with pytest.raises(ValueError, match="load the teacher separately"):
        PruningTrainer(model=model, args=arguments(tmp_path), train_dataset=data(), teacher=base)


def test_nobody_advances_the_schedule(tmp_path):
    trainer = Trainer(model=smp_bert(), args=arguments(tmp_path), train_dataset=data())
    with pytest.warns(UserWarning, match="nobody advances the sparsity schedule.*PruningCallback"):
        trainer.train()
    with pytest.warns(UserWarning, match="sparsity 0.0000, not at the 0.9000 asked for: nobody has advanced"):
        finalize(trainer.model)


def test_interrupted_schedule_is_told():
    model = smp_bert(total_steps=10)
    update_schedule(model, 2)
    with pytest.warns(UserWarning, match="the schedule stands at step 2 of 10"):
        finalize(model)


def test_penalty_to_log_is_the_papers_formula():
    model = smp_bert(penalty=400.0)
    assert penalty(model) == 0
    randomize_scores(model)
    update_schedule(model, 5, 10)
    means = [torch.sigmoid(layer.scores["default"]).mean().item() for layer in pruning_layers(model)]
    assert penalty(model) == pytest.approx(400 * (1 - 0.5**3) * sum(means) / len(means), rel=1e-5)


def test_offloaded_weights_are_told(batch):
    model = prune(make_bert())
    layer = pruning_layers(model)[0]
    layer.get_base_layer().to("meta")
    with pytest.raises(RuntimeError, match="layer.0.attention.self.query' is offloaded"):
        model(input_ids=batch["input_ids"])


def test_wrong_use_is_told(tmp_path):
    model = smp_bert()
    with pytest.raises(ValueError, match="total_steps=None.*Set `total_steps`"):
        update_schedule(model, 1)
    with pytest.raises(ValueError, match="step=11 must be a whole number and lie between 0 and total_steps=10"):
        update_schedule(model, 11, 10)
    with pytest.raises(ValueError, match="grad_scale=nan must be"):
        update_schedule(model, 1, 10, grad_scale=float("nan"))
    with pytest.raises(ValueError, match="contains no pruning adapter"):
        update_schedule(nn.Linear(2, 2), 1, 10)
    with pytest.raises(ValueError, match="adapter_name='other'"):
        finalize(model, "other")
    update_schedule(model, 10, 10)
    finalize(model)
    with pytest.raises(ValueError, match="masks are final already"):
        update_schedule(model, 1, 10)
    with pytest.raises(ValueError, match="final already"):
        finalize(model)
    with pytest.raises(ValueError, match="masks are final already"):
        create_pruning_optimizer(model, 1e-3)
    with pytest.raises(ValueError, match="masks are final already"):
        Trainer(model=model, args=arguments(tmp_path), train_dataset=data(), callbacks=[PruningCallback()]).train()
    with pytest.raises(ValueError, match="contains no pruning adapter"):
        callbacks = [PruningCallback()]
        Trainer(model=make_bert(), args=arguments(tmp_path), train_dataset=data(), callbacks=callbacks).train()
    with pytest.raises(ValueError, match=r"distillation_alpha=1\.5"):
        PruningTrainer(model=smp_bert(), args=arguments(tmp_path), distillation_alpha=1.5)
    with pytest.raises(ValueError, match="distillation_temperature=0"):
        PruningTrainer(model=smp_bert(), args=arguments(tmp_path), distillation_temperature=0)


@needs_adapters_of_transformers
def test_works_after_inject_and_add_adapter(batch):
    injected = inject_adapter_in_model(SMPConfig(sparsity=0.9), make_gpt2())
    added = make_gpt2()
    added.add_adapter(SMPConfig(sparsity=0.9), adapter_name="mask")
    added.set_adapter("mask")
    for model in (injected, added):
        optimizer = create_pruning_optimizer(model, lr=1e-3)
        model.train()
        update_schedule(model, 0, 4)
        for step in range(4):
            model(input_ids=batch["input_ids"], labels=batch["input_ids"]).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            report = update_schedule(model, step + 1)
        assert report["sparsity"] == pytest.approx(0.9, abs=1e-3)
        before = logits(model, batch)
        finalize(model)
        assert torch.equal(logits(model, batch), before)


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_gives_the_same_gradients(batch, reentrant):
    results = []
    for checkpointing in (False, True):
        model = prune(make_bert(), 0.5, penalty=100.0)
        if checkpointing:
            model.get_base_model().gradient_checkpointing_enable({"use_reentrant": reentrant})
            model.enable_input_require_grads()
        model.train()
        update_schedule(model, 10, 10)
        model(**batch).loss.backward()
        results.append([layer.scores["default"].grad for layer in pruning_layers(model)])
    for plain, checkpointed in zip(*results, strict=True):
        torch.testing.assert_close(plain, checkpointed)


def test_schedule_is_a_method_too_as_in_adalora():
    model = smp_bert()
    assert model.base_model.update_schedule(10, 10)["sparsity"] == pytest.approx(0.9, abs=1e-3)
    assert model.update_schedule(0, 10)["sparsity"] == 0


def test_trainers_own_card_says_to_import(tmp_path):
    trainer = PruningTrainer(model=smp_bert(), args=arguments(tmp_path), train_dataset=data())
    trainer.save_model()
    trainer.create_model_card()
    assert (tmp_path / "README.md").read_text().count("import peft_prune") == 1


def test_scores_without_a_learning_rate_of_their_own_are_told(tmp_path):
    def train(**kwargs):
        model = smp_bert(score_lr=0.03)
        optimizer = kwargs.pop("own", lambda model: None)(model)
        trainer = Trainer(
            model=model,
            args=arguments(tmp_path, max_steps=1, learning_rate=1e-3),
            train_dataset=data(),
            callbacks=[PruningCallback()],
            optimizers=(optimizer, None),
        )
        trainer.train()

    with pytest.warns(UserWarning, match=r"all other weights, 0\.001, and not at score_lr=0\.03"):
        train()
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*score_lr")
        train(own=lambda model: create_pruning_optimizer(model, lr=1e-3))


def test_a_teacher_that_is_no_model_is_told(tmp_path):
    with pytest.raises(TypeError, match="teacher='some/model' must be a model"):
        PruningTrainer(model=smp_bert(), args=arguments(tmp_path), teacher="some/model")


def test_the_logged_learning_rate_is_the_one_that_was_given(tmp_path):
    model = smp_bert(score_lr=0.03)
    args = arguments(tmp_path, max_steps=2, learning_rate=1e-3, lr_scheduler_type="constant", logging_steps=1)
    trainer = PruningTrainer(model=model, args=args, train_dataset=data())
    trainer.train()
    assert {row["learning_rate"] for row in trainer.state.log_history if "learning_rate" in row} == {1e-3}


@pytest.mark.parametrize(("step", "total", "message"), [(1.5, 10, "step=1.5 must be"), (1, "10", "total_steps='10'")])
def test_steps_that_are_no_whole_numbers_are_told(step, total, message):
    with pytest.raises(ValueError, match=message):
        update_schedule(smp_bert(), step, total)


def test_a_final_adapter_that_is_not_in_every_layer_is_told():
    model = smp_bert()
    model.add_adapter("queries", SMPConfig(task_type="SEQ_CLS", target_modules=["query"], sparsity=0.5))
    model.set_adapter("queries")
    update_schedule(model, 10, 10)
    finalize(model)
    with pytest.raises(ValueError, match="masks are final already"):
        update_schedule(model, 10, 10)


def test_a_second_callback_does_no_harm(tmp_path):
    model = smp_bert()
    args = arguments(tmp_path, max_steps=2)
    Trainer(model=model, args=args, train_dataset=data(), callbacks=[PruningCallback(), PruningCallback()]).train()
    assert all(layer.config("default").finalized for layer in pruning_layers(model))
