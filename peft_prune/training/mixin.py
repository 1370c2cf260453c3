"""What makes any `Trainer` prune: the callback, and a learning rate for the scores."""

from __future__ import annotations

from typing import Any, Optional

import torch
from torch import nn
from transformers import PrinterCallback, ProgressCallback

from ..config import PruningConfig
from ..model_card import add_loading_instructions
from .callback import PruningCallback, without_densities
from .optimizer import make_optimizer, pruning_parameter_groups


def _print_less(callback: Any) -> None:
    """Have a callback that prints what is logged leave out the densities, one for each kind of matrix."""
    on_log = callback.on_log

    def shorter(args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> Any:
        return on_log(args, state, control, logs=without_densities(logs or {}), **kwargs)

    callback.on_log = shorter


class PruningTrainerMixin:
    """
    Makes a subclass of [`~transformers.Trainer`] prune; [`PruningTrainer`] adds distillation.

    Put it before the trainer. It adds a [`PruningCallback`] if there is none, gives the scores their own learning rate
    and no weight decay, and logs sparsity, penalty and densities with the loss. Training can be resumed as usual.

    Args:
        score_lr (`float`, *optional*): learning rate of the scores, by default the config's `score_lr`.
            `TrainingArguments.learning_rate` is for everything else.
        args, kwargs: arguments of the trainer.

    Example:

        ```py
        >>> from trl import SFTTrainer
        >>> from peft_prune import PruningTrainerMixin, SMPConfig

        >>> class PruningSFTTrainer(PruningTrainerMixin, SFTTrainer):
        ...     pass

        >>> trainer = PruningSFTTrainer(model, train_dataset=dataset, peft_config=SMPConfig(task_type="CAUSAL_LM"))
        ```
    """

    # what is used of the trainer
    model: Any
    args: Any
    optimizer: Any
    optimizer_cls_and_kwargs: Any
    callback_handler: Any

    def __init__(self, *args: Any, score_lr: Optional[float] = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.score_lr = score_lr
        callbacks = [c for c in self.callback_handler.callbacks if isinstance(c, PruningCallback)]
        self.pruning_callback = callbacks[0] if callbacks else PruningCallback()
        if not callbacks:
            self.callback_handler.add_callback(self.pruning_callback)
        for callback in self.callback_handler.callbacks:
            if isinstance(callback, (PrinterCallback, ProgressCallback)):
                _print_less(callback)
        if self.args.ddp_broadcast_buffers is None:
            # every process finds the same masks; sending them before each forward pass costs a bit per weight
            self.args.ddp_broadcast_buffers = False

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Log, with sparsity, penalty and densities beside the training loss, so that every reporter shows them.

        The densities are left out of the lines that are printed.
        """
        if "loss" in logs:
            logs = logs | self.pruning_callback.report(self.model)
        super().log(logs, *args, **kwargs)  # type: ignore[misc]

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """Write the trainer's card, and how to load the adapter into it."""
        super().create_model_card(*args, **kwargs)  # type: ignore[misc]
        for config in getattr(self.model, "peft_config", {}).values():
            if isinstance(config, PruningConfig):
                add_loading_instructions(str(self.args.output_dir), config)

    def create_optimizer(self, model: Optional[nn.Module] = None) -> torch.optim.Optimizer:
        """Create the optimizer that `args.optim` names, with a parameter group for the scores."""
        if self.optimizer is None:
            target = self.model if model is None else model
            make: Any = self
            cls, kwargs = self.optimizer_cls_and_kwargs or make.get_optimizer_cls_and_kwargs(self.args, target)
            rate = kwargs.get("lr", self.args.learning_rate)  # what came with a class of one's own goes first
            groups = pruning_parameter_groups(target, rate, self.score_lr, self.args.weight_decay)
            self.optimizer = make_optimizer(cls, groups, **kwargs)
            self.pruning_callback.groups_are_set = True
        return self.optimizer
