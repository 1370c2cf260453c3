"""A `Trainer` that prunes: the callback, a learning rate for the scores, distillation."""

from __future__ import annotations

from .distilling_trainer import DistillationTrainer
from .mixin import PruningTrainerMixin


class PruningTrainer(PruningTrainerMixin, DistillationTrainer):
    """
    [`~transformers.Trainer`] for pruning adapters.

    Args:
        teacher (`nn.Module` or `str`, *optional*): a trained model to distil from, or `"base"`; see
            [`DistillationTrainer`].
        score_lr (`float`, *optional*): learning rate of the scores, by default the config's `score_lr`.
            `TrainingArguments.learning_rate` is for everything else, for instance the classifier.
        distillation_alpha (`float`): weight of the distillation in `(1 − α) · task + α · distillation`; 0.5 by default.
        distillation_temperature (`float`): τ; 2 by default.
        kwargs: all other arguments of [`~transformers.Trainer`].

    Raises:
        ValueError, TypeError: as [`DistillationTrainer`].
    """
