"""The callback that lets any `Trainer` prune."""

from __future__ import annotations

import warnings
from typing import Any, Optional

from transformers import TrainerCallback

from ..layers.layer import pruning_layers
from ..layers.sharding import refuse_data_parallel
from ..report.summary import by_kind, layer_densities
from ..report.training import DENSITY
from ..selection.topk import compile_selection
from ..stages.finalize import finalize
from ..stages.schedule import penalty, trained_adapters, update_schedule, why_nothing_trains
from .start import calibrate_on_training_data, examples_for_stages


_INSTEAD = (
    "Use PruningTrainer, or for another trainer, such as TRL's: class PruningSFTTrainer(PruningTrainerMixin, "
    "SFTTrainer). Or give your Trainer optimizers=(peft_prune.create_pruning_optimizer(model, lr=...), None)."
)


def _warn_about_groups(model: Any, optimizer: Any, learning_rate: Optional[float]) -> None:
    """Warn if scores are trained as other weights are: at their learning rate, and with weight decay."""
    for name, layers in trained_adapters(model).items():
        held = [layer.held(kind) for layer in layers for kind in layers[0].host[name].recipe.importance.tensors]
        scores = {id(holder[name]) for holder in held if name in holder}
        if not scores:
            continue
        for group in getattr(optimizer, "param_groups", ()):
            ours = sum(id(parameter) in scores for parameter in group["params"])
            rate, wanted = group.get("initial_lr", group["lr"]), layers[0].config(name).score_lr
            if ours and rate != wanted and (ours < len(group["params"]) or rate == learning_rate):
                warnings.warn(
                    f"The scores are trained at the learning rate of all other weights, {rate:g}, and not at "
                    f"score_lr={wanted:g} of the config. {_INSTEAD}",
                    UserWarning,
                    stacklevel=3,
                )
            if ours and group.get("weight_decay"):
                warnings.warn(
                    f"weight_decay={group['weight_decay']:g} is applied to the scores, which pulls them towards 0 "
                    f"and changes the masks. {_INSTEAD} Neither decays scores. Or set weight_decay=0.",
                    UserWarning,
                    stacklevel=3,
                )


def _warn_of_doubts(model: Any, total_steps: int, args: Any) -> None:
    """Warn where a training is unlikely to work as it is set up."""
    decays = "constant" not in str(getattr(args, "lr_scheduler_type", ""))
    for name, layers in trained_adapters(model).items():
        config = layers[0].config(name)
        for doubt in config.doubts(total_steps, getattr(args, "learning_rate", None), decays):
            warnings.warn(f"Adapter {name!r}: {doubt}", UserWarning, stacklevel=4)


def without_densities(logs: dict[str, float]) -> dict[str, float]:
    """What is logged, without the densities: a line that can be read while training runs."""
    return {name: value for name, value in logs.items() if not name.startswith(DENSITY)}


class PruningCallback(TrainerCallback):
    """Advances sparsity and penalty after each optimizer step, logs them, and finalizes the masks at the end.

    Scores with a calibrated start that have not been calibrated yet are calibrated on examples of the training data
    first.

    Before the first step it warns if a training is unlikely to work: too few steps for the sparsity, or a learning rate
    or penalty that is known to fail.

    Works with any [`~transformers.Trainer`], TRL's included. It does not create the optimizer. It warns if scores are
    trained at the learning rate, or with the weight decay, of other weights: see [`PruningTrainerMixin`].
    `load_best_model_at_end` compares evaluations at the final sparsity only: an early, denser model would always look
    better.

    Args:
        finalize_at_end (`bool`): turn scores into masks when training ends. With `False` they stay trainable, and you
            call [`peft_prune.finalize`].

    Raises:
        ValueError: at the beginning of training, if the model has no pruning adapter with trainable scores, or if
            `Trainer` uses `DataParallel` for several GPUs.
    """

    def __init__(self, finalize_at_end: bool = True) -> None:
        self.finalize_at_end = finalize_at_end
        self.last: dict[str, float] = {}
        self._batches: Optional[list[Any]] = None  # for methods that prune by what layers see
        self.groups_are_set = False  # by a trainer that gives the scores a learning rate of their own

    def _grad_scale(self, optimizer: Any) -> float:
        scaler = getattr(optimizer, "scaler", None)
        return float(scaler.get_scale()) if scaler is not None else 1.0

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        """Find the adapters, calibrate their start, and set the schedule to where training begins or is resumed."""
        refuse_data_parallel(model, gpus=getattr(args, "n_gpu", 1))
        if not trained_adapters(model):
            raise ValueError(f"PruningCallback has nothing to train: {why_nothing_trains(model)}")
        for layer in pruning_layers(model):
            layer.schedule_is_managed = True
        if getattr(args, "torch_compile", False):
            compile_selection()
        if not self.groups_are_set:
            _warn_about_groups(model, kwargs.get("optimizer"), getattr(args, "learning_rate", None))
        if state.global_step == 0 and state.is_world_process_zero:
            _warn_of_doubts(model, state.max_steps, args)
        calibrate_on_training_data(model, kwargs.get("train_dataloader"), args, tell=state.is_world_process_zero)
        self._batches = examples_for_stages(model, kwargs.get("train_dataloader"), args)
        self._advance(state, model, kwargs.get("optimizer"))

    def _advance(self, state: Any, model: Any, optimizer: Optional[Any]) -> None:
        self.last = update_schedule(
            model, min(state.global_step, state.max_steps), state.max_steps, self._grad_scale(optimizer), self._batches
        )

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        """Advance the schedule."""
        self._advance(state, model, kwargs.get("optimizer"))

    def on_step_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        """Forget a best model that was chosen while sparsity was still growing."""
        if state.best_metric is None:
            return
        for name, layers in trained_adapters(model).items():
            config = layers[0].config(name)
            if state.global_step < config.final_step(state.max_steps):
                state.best_metric = state.best_model_checkpoint = state.best_global_step = None

    def report(self, model: Any) -> dict[str, float]:
        """Sparsity, penalty and the density of each kind of matrix at present: what is logged.

        Returns:
            `dict[str, float]`: `sparsity`; `penalty_lambda` and `penalty` if a config has a penalty; and for each kind
            of matrix `density/` and its name, such as `density/attention.self.query`. Sparsity and densities are those
            of the first active adapter.
        """
        last = {key: float(value) for key, value in self.last.items()}  # waits for a device that has not counted yet
        adapters = trained_adapters(model)
        hosts = [layers[0].host[name] for name, layers in adapters.items()]
        if any(host.recipe.importance.tensors and host.config.penalty for host in hosts):
            last["penalty"] = penalty(model)
        else:
            last.pop("penalty_lambda", None)
        if not adapters:
            return last
        kinds = by_kind(layer_densities(model, next(iter(adapters))))[:-1]  # the last is all of them together
        return last | {f"{DENSITY}{kind}": kept / size for kind, size, kept, *_ in kinds}

    def on_log(
        self, args: Any, state: Any, control: Any, model: Any = None, logs: Optional[dict] = None, **kwargs: Any
    ) -> None:
        """Add sparsity and penalty to what is logged, and densities to `state.log_history`.

        `PruningTrainer` has done so before, and for all callbacks.
        """
        if logs is not None and "loss" in logs and "sparsity" not in logs:
            report = self.report(model)
            logs.update(without_densities(report))  # which callbacks that come later may print
            if state.log_history and "loss" in state.log_history[-1]:
                state.log_history[-1].update(report)

    def on_train_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        """Finalize the masks; the best model has been loaded by now."""
        for layer in pruning_layers(model):
            layer.schedule_is_managed = False
        if self.finalize_at_end and trained_adapters(model):  # a second callback finds the first one's work
            finalize(model)
