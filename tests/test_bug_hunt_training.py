"""How scores are trained: their learning rate and weight decay under any trainer, and schedules of merged adapters."""

import warnings

import pytest
import torch
from datasets import Dataset
from helpers.data import arguments, data, tokenizer
from helpers.methods import TRAINED, config, smp_bert
from helpers.models import make_llama
from peft import get_peft_model
from transformers import Trainer

from peft_prune import (
    PruningCallback,
    PruningTrainer,
    PruningTrainerMixin,
    SMPConfig,
    create_pruning_optimizer,
    finalize,
    update_schedule,
)
from peft_prune.layers.layer import pruning_layers


class Mixed(PruningTrainerMixin, Trainer):
    """Any trainer, made to prune."""


def causal(cls, tmp_path, callbacks=(), optimizers=(None, None), model=None, **changes):
    """A trainer of a causal LM, of which scores are all that is trained."""
    model = model or get_peft_model(make_llama(), SMPConfig(task_type="CAUSAL_LM", score_lr=0.03))
    rows = Dataset.from_dict({"input_ids": [[2, 5, 7, 8]] * 16, "labels": [[2, 5, 7, 8]] * 16})
    args = arguments(tmp_path, **{"max_steps": 1} | changes)
    return cls(
        model=model, args=args, train_dataset=rows, callbacks=list(callbacks), optimizers=optimizers,
        data_collator=lambda batch: {key: torch.tensor([row[key] for row in batch]) for key in batch[0]},
    )  # fmt: skip


def score_groups(trainer):
    """Learning rate and weight decay of each parameter group that holds a score."""
    scores = {id(layer.scores["default"]) for layer in pruning_layers(trainer.model)}
    groups = [g for g in trainer.optimizer.param_groups if any(id(p) in scores for p in g["params"])]
    return [(group.get("initial_lr", group["lr"]), group["weight_decay"]) for group in groups]


def test_13_scores_that_are_all_that_is_trained_are_told_of(tmp_path):
    with pytest.warns(UserWarning, match=r"all other weights, 0\.001, and not at score_lr=0\.03.*PruningTrainerMixin"):
        causal(Trainer, tmp_path, [PruningCallback()]).train()


def test_13_no_warning_where_scores_have_a_learning_rate(tmp_path):
    model = get_peft_model(make_llama(), SMPConfig(task_type="CAUSAL_LM", score_lr=0.03))
    own = create_pruning_optimizer(model, lr=1e-3)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*score_lr")
        causal(Trainer, tmp_path, [PruningCallback()], (own, None), model).train()
        causal(PruningTrainer, tmp_path).train()
        causal(Mixed, tmp_path).train()


def test_13_a_learning_rate_that_is_asked_for_is_used_without_a_warning(tmp_path):
    trainer = Mixed(
        model=smp_bert(score_lr=0.03), args=arguments(tmp_path, max_steps=1), train_dataset=data(), score_lr=1e-3
    )
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*score_lr")
        trainer.callback_handler.callbacks[-1].finalize_at_end = False
        trainer.train()
    assert score_groups(trainer) == [(1e-3, 0.0)]


@pytest.mark.parametrize("callbacks", [0, 1])
def test_13_any_trainer_can_be_made_to_prune(tmp_path, callbacks):
    trainer = causal(Mixed, tmp_path, [PruningCallback(finalize_at_end=False) for _ in range(callbacks)])
    assert sum(isinstance(c, PruningCallback) for c in trainer.callback_handler.callbacks) == 1
    trainer.pruning_callback.finalize_at_end = False
    trainer.train()
    assert score_groups(trainer) == [(0.03, 0.0)]
    assert any("sparsity" in row for row in trainer.state.log_history)


def test_13_the_mixin_resumes_where_it_stopped(tmp_path):
    def run(folder, **train):
        trainer = Mixed(
            model=smp_bert(), args=arguments(folder, max_steps=6, save_strategy="steps", save_steps=3),
            train_dataset=data(),
        )  # fmt: skip
        trainer.train(**train)
        return [layer.get_mask("default") for layer in pruning_layers(trainer.model)]

    whole = run(tmp_path / "a")
    resumed = run(tmp_path / "b", resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-3"))
    assert all(torch.equal(one, other) for one, other in zip(whole, resumed, strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("method", TRAINED)
def test_13_sft_trainer_with_the_learning_rate_of_the_scores(method, tmp_path):
    trl = pytest.importorskip("trl")

    class PruningSFTTrainer(PruningTrainerMixin, trl.SFTTrainer):
        """As the docs show it."""

    words = tokenizer()
    words.eos_token = "[SEP]"
    args = trl.SFTConfig(
        output_dir=str(tmp_path), max_steps=3, per_device_train_batch_size=4, max_length=16, use_cpu=True, bf16=False,
        report_to="none", save_strategy="no", logging_steps=1, disable_tqdm=True, dataloader_pin_memory=False,
    )  # fmt: skip
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*score_lr")
        trainer = PruningSFTTrainer(
            model=make_llama(), args=args, processing_class=words,
            train_dataset=Dataset.from_dict({"text": ["it was good film"] * 16}),
            peft_config=config(method, task_type="CAUSAL_LM"), score_lr=0.07,
        )  # fmt: skip
        rates = {group["lr"] for group in trainer.create_optimizer().param_groups}
        assert (0.07 in rates) == (method != "dsee")  # DSEE has no scores
        trainer.train()
    assert all(layer.config("default").finalized for layer in pruning_layers(trainer.model))


def test_26_weight_decay_of_scores_is_told(tmp_path):
    with pytest.warns(UserWarning, match=r"weight_decay=0\.1 is applied to the scores"):
        causal(Trainer, tmp_path, [PruningCallback()], weight_decay=0.1).train()
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*weight_decay")
        trainer = causal(Mixed, tmp_path, weight_decay=0.1)
        trainer.train()
        causal(Trainer, tmp_path, [PruningCallback()]).train()


@pytest.mark.parametrize("method", TRAINED)
def test_26_the_schedule_of_a_merged_adapter_is_not_advanced(method):
    model = get_peft_model(make_llama(), config(method))
    update_schedule(model, 0, 4)
    model.merge_adapter()
    steps = [layer.steps("default") for layer in pruning_layers(model)]
    with pytest.raises(ValueError, match=r"model\.unmerge_adapter\(\)"):
        update_schedule(model, 4, 4)
    assert [layer.steps("default") for layer in pruning_layers(model)] == steps
    model.unmerge_adapter()
    update_schedule(model, 4, 4)
    finalize(model)
