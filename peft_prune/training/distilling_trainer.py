"""A `Trainer` whose model learns from a teacher as well as from labels."""

from __future__ import annotations

import inspect
from typing import Any, Optional, cast

import torch
import torch.nn.functional as F
from torch import nn
from transformers import Trainer
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from ..peft_api import base_of
from .distillation import distillation_loss
from .teacher import as_base


def _without_labels(inputs: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in inputs.items() if name != "labels"}


def _divides_by_item_count(model: Any) -> bool:
    """Whether the loss of a model is divided by the number of items that it is told."""
    heads = ("ForSequenceClassification", "ForQuestionAnswering", "ForMultipleChoice", "ForImageClassification")
    configs = getattr(model, "peft_config", {}).values()
    if type(base_of(model)).__name__.endswith(heads) or any(getattr(config, "verbalizer", None) for config in configs):
        return False
    try:
        source = inspect.getsource(type(base_of(model)).forward)
    except (OSError, TypeError):  # a class made at run time
        return True
    return "loss_function" in source or "num_items_in_batch" in source


class DistillationTrainer(Trainer):
    """
    [`~transformers.Trainer`] with a teacher, for any model: for instance a smaller model with a LoRA on it.
    [`PruningTrainer`] adds pruning.

    Args:
        teacher (`nn.Module` or `str`, *optional*): a trained model to distil from; put in eval mode, never trained.
            `"base"`: the model without its adapters, which needs no second copy in memory. It must know the task
            already, as a language model does.
        distillation_alpha (`float`): weight of the distillation in `(1 − α) · task + α · distillation`.
        distillation_temperature (`float`): τ.
        kwargs: all other arguments of [`~transformers.Trainer`].

    Raises:
        ValueError: `distillation_alpha` is not in [0, 1], `distillation_temperature` not positive, or the teacher a
            part of the model.
        TypeError: `teacher` is neither a model nor `"base"`.

    Example:

        ```py
        >>> from peft_prune import DistillationTrainer

        >>> trainer = DistillationTrainer(model, args, train_dataset=dataset, teacher=dense, distillation_alpha=0.5)
        ```
    """

    def __init__(
        self,
        *args: Any,
        teacher: Optional[nn.Module | str] = None,
        distillation_alpha: float = 0.5,
        distillation_temperature: float = 2.0,
        **kwargs: Any,
    ) -> None:
        if not 0 <= distillation_alpha <= 1:
            raise ValueError(f"distillation_alpha={distillation_alpha!r} must be in [0, 1]; the papers use 0.5.")
        if distillation_temperature <= 0:
            raise ValueError(f"distillation_temperature={distillation_temperature!r} must be positive; try 2.")
        if teacher is not None and teacher != "base" and not isinstance(teacher, nn.Module):
            raise TypeError(
                f"teacher={teacher!r} must be a model, loaded with from_pretrained, or 'base', the model without its "
                "adapters."
            )
        super().__init__(*args, **kwargs)
        trained = map(id, cast(nn.Module, self.model).modules())
        if isinstance(teacher, nn.Module) and not {id(m) for m in teacher.modules()}.isdisjoint(trained):
            raise ValueError(
                "teacher shares modules with the model that is trained: get_peft_model changes the base model in "
                "place. Use teacher='base', which needs no second copy; or load the teacher separately with "
                "from_pretrained, or copy.deepcopy it before get_peft_model."
            )
        self.distillation_alpha = distillation_alpha
        self.distillation_temperature = distillation_temperature
        self.teacher = teacher
        if isinstance(teacher, nn.Module):
            self.teacher = teacher.to(self.args.device).eval().requires_grad_(False)  # type: ignore[arg-type]
        if not _divides_by_item_count(self.model):
            # A mean over the batch, which Trainer then divides by the accumulation steps. Told the number of items,
            # BERT and others would not use it, Trainer would not divide, and 4 × 8 would have four times the gradient.
            self.model_accepts_loss_kwargs = False

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Optional[torch.Tensor | int] = None,
    ) -> Any:
        """The task's loss; in training, mixed with the distillation from the teacher."""
        labels = inputs.get("labels")  # now: label smoothing and `compute_loss_func` have them taken out
        distilled = self.teacher is not None and model.training
        if distilled and self.distillation_alpha == 1 and not self._needs_labels():
            outputs = model(**_without_labels(inputs))  # the task's loss would be one more copy of the logits
            loss = self._distance(inputs, outputs, labels, num_items_in_batch)
            return (loss, outputs) if return_outputs else loss
        loss, outputs = super().compute_loss(model, inputs, return_outputs=True, num_items_in_batch=num_items_in_batch)
        if distilled:
            distance = self._distance(inputs, outputs, labels, num_items_in_batch)
            loss = (1 - self.distillation_alpha) * loss + self.distillation_alpha * distance
        return (loss, outputs) if return_outputs else loss

    def _needs_labels(self) -> bool:
        """Whether a forward pass makes decoder inputs of the labels."""
        return bool(getattr(getattr(base_of(self.model), "config", None), "is_encoder_decoder", False))

    def _answers(self, inputs: dict[str, Any]) -> Any:
        """The teacher's output."""
        inputs = inputs if self._needs_labels() else _without_labels(inputs)
        if isinstance(self.teacher, str):
            with as_base(cast(nn.Module, self.model)) as base:
                return base(**inputs)
        with torch.no_grad():
            return self.teacher(**inputs)  # type: ignore[misc]

    def _distance(
        self,
        inputs: dict[str, Any],
        outputs: Any,
        labels: Optional[torch.Tensor],
        num_items: Optional[torch.Tensor | int],
    ) -> torch.Tensor:
        """Distance from the teacher, divided by what the task's loss is divided by."""
        answers = self._answers(inputs)
        base = base_of(self.accelerator.unwrap_model(self.model))
        if labels is not None and type(base).__name__ in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values():
            labels = F.pad(labels[..., 1:], (0, 1), value=-100)  # each at the position that predicts it
        counts = self.model_accepts_loss_kwargs or self.compute_loss_func is not None
        count: Any = num_items if counts else None
        if count is not None and self.args.average_tokens_across_devices:
            count = count / max(self.accelerator.num_processes, self.args.n_gpu)  # their gradients are averaged
        problem = getattr(getattr(base, "config", None), "problem_type", None)
        distance = distillation_loss(
            outputs, answers, self.distillation_temperature, labels, count, problem, overwrite_teacher=True
        )
        if self.compute_loss_func is not None and count is None:  # Trainer leaves the division to that function
            distance = distance / getattr(self, "current_gradient_accumulation_steps", 1)
        return distance
