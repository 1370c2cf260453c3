"""What docs/support.md says of trainers, for every method; what one method alone needs is in its own file."""

import pytest
import torch
from helpers.data import arguments, data
from helpers.methods import CALIBRATED, TRAINED, adapter, config
from helpers.models import logits, make_bert
from peft import PeftModel, get_peft_model
from transformers import EarlyStoppingCallback, Trainer, TrainerCallback

from peft_prune import PruningCallback, PruningTrainer
from peft_prune.layers.layer import pruning_layers
from peft_prune.stages.schedule import sparsity


class Stop(TrainerCallback):
    """Somebody else's: ends training early."""

    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = state.global_step == 2


@pytest.mark.parametrize(
    ("method", "trainer_cls"),
    [("smp", Trainer), ("smp", PruningTrainer), ("movement", PruningTrainer), ("dsee", Trainer)],
)
def test_trainer_evaluates_and_loads_the_best_model(method, trainer_cls, tmp_path, batch):
    args = arguments(
        tmp_path,
        max_steps=6,
        eval_strategy="steps",
        eval_steps=2,
        save_strategy="steps",
        save_steps=2,
        save_total_limit=2,
        load_best_model_at_end=True,
        metric_for_best_model="loss",
        gradient_accumulation_steps=2,
    )
    trainer = trainer_cls(
        model=get_peft_model(make_bert(), config(method, task_type="SEQ_CLS", modules_to_save=["pooler"])),
        args=args,
        train_dataset=data(),
        eval_dataset=data(16, seed=1),
        callbacks=[PruningCallback(), EarlyStoppingCallback(early_stopping_patience=20)],
    )
    trainer.train()
    losses = {entry["step"]: entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry}
    assert sorted(losses) == [2, 4, 6]
    best = int(trainer.state.best_model_checkpoint.rpartition("-")[2])
    pruned = [step for step in losses if step >= 4]  # the schedules end at 60 % of the steps, or before
    assert best in pruned and losses[best] == min(losses[step] for step in pruned)
    left = {path.name for path in tmp_path.glob("checkpoint-*")}
    assert len(left) <= 2 and {f"checkpoint-{best}", "checkpoint-6"} <= left
    assert trainer.evaluate()["eval_loss"] == pytest.approx(losses[best], abs=1e-6)
    assert trainer.model.peft_config["default"].finalized
    again = PeftModel.from_pretrained(make_bert(), trainer.state.best_model_checkpoint)
    torch.testing.assert_close(logits(again, batch), logits(trainer.model, batch))


@pytest.mark.parametrize("method", TRAINED)
def test_stopping_early_is_told(method, tmp_path):
    trainer = Trainer(
        model=get_peft_model(make_bert(), config(method, task_type="SEQ_CLS")),
        args=arguments(tmp_path),
        train_dataset=data(),
        callbacks=[PruningCallback(), Stop()],
    )
    with pytest.warns(UserWarning, match="schedule stands at step 2 of 10"):
        trainer.train()


@pytest.mark.parametrize("method", CALIBRATED)
def test_calibrated_methods_have_nothing_to_train(method, tmp_path):
    with pytest.raises(ValueError, match="not trained. Calibrate them"):
        PruningTrainer(
            model=adapter(make_bert(), method, task_type="SEQ_CLS"), args=arguments(tmp_path), train_dataset=data()
        ).train()


@pytest.mark.slow
@pytest.mark.parametrize("method", TRAINED)
def test_hyperparameter_search(method, tmp_path):
    optuna = pytest.importorskip("optuna")
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    made = []

    def model_init(trial=None):
        wanted = 0.5 if trial is None else trial.suggest_float("sparsity", 0.5, 0.8)
        made.append(get_peft_model(make_bert(), config(method, task_type="SEQ_CLS", sparsity=wanted)))
        return made[-1]

    trainer = PruningTrainer(
        model_init=model_init,
        args=arguments(tmp_path, max_steps=3, eval_strategy="steps", eval_steps=3),
        train_dataset=data(16),
        eval_dataset=data(8),
    )
    best = trainer.hyperparameter_search(
        hp_space=lambda trial: {"learning_rate": trial.suggest_float("learning_rate", 1e-4, 1e-2, log=True)},
        backend="optuna",
        n_trials=2,
        direction="minimize",
    )
    assert {"learning_rate", "sparsity"} == set(best.hyperparameters)
    trained = [model for model in made if model.peft_config["default"].finalized]
    assert len(trained) == 2
    for model in trained:
        wanted = model.peft_config["default"].sparsity
        assert wanted > 0.5 and sparsity(pruning_layers(model), "default") == pytest.approx(wanted, abs=0.01)
