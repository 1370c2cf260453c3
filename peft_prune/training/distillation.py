"""Distillation from a teacher: what the student's outputs are compared with."""

from __future__ import annotations

from typing import Any, Optional

import torch
import torch.nn.functional as F


def soft_cross_entropy(student: torch.Tensor, teacher: torch.Tensor, temperature: float) -> torch.Tensor:
    """`τ² · KL(teacher/τ ‖ student/τ)` of each row (Hinton et al. 2015).

    Args:
        student (`torch.Tensor`): logits, shape (..., classes).
        teacher (`torch.Tensor`): logits, the same shape.
        temperature (`float`): τ.

    Returns:
        `torch.Tensor`: float32, shape (...).
    """
    log_student = F.log_softmax(student.float() / temperature, dim=-1)
    log_teacher = F.log_softmax(teacher.float() / temperature, dim=-1)
    return F.kl_div(log_student, log_teacher, reduction="none", log_target=True).sum(-1) * temperature**2


def distillation_loss(
    student: Any,
    teacher: Any,
    temperature: float = 2.0,
    labels: Optional[torch.Tensor] = None,
    num_items: Optional[torch.Tensor | int] = None,
) -> torch.Tensor:
    """Distance of a student's outputs from a teacher's, for every head whose outputs Transformers names.

    Classification: soft cross entropy. Regression (one output): squared error. Token classification and language
    modelling: soft cross entropy over the positions whose label is not -100. Question answering: mean over start and
    end.

    Args:
        student: model output with `logits`, or `start_logits` and `end_logits`.
        teacher: the teacher's output for the same inputs.
        temperature (`float`): τ.
        labels (`torch.Tensor`, *optional*): shape (batch, positions), for heads that answer at every position.
        num_items (*optional*): number of labels in the whole accumulated batch, to divide the sum by; by default the
            mean over this one is taken.

    Raises:
        ValueError: student and teacher answer in different shapes.
    """
    if "start_logits" in student:
        pairs = [(student[key], teacher[key]) for key in ("start_logits", "end_logits")]
    else:
        pairs = [(student["logits"], teacher["logits"])]
    for ours, theirs in pairs:
        if ours.shape != theirs.shape:
            raise ValueError(
                f"The teacher's logits are {tuple(theirs.shape)} but the student's are {tuple(ours.shape)}. Use a "
                "teacher with the same head, labels and tokenizer."
            )
    if pairs[0][0].dim() == 2 and pairs[0][0].shape[-1] == 1:
        return F.mse_loss(pairs[0][0].float(), pairs[0][1].float())
    rows = [soft_cross_entropy(ours, theirs, temperature) for ours, theirs in pairs]
    if rows[0].dim() == 2 and labels is not None and labels.shape == rows[0].shape:
        return _mean_over_labels(rows[0], labels, num_items)
    return torch.stack([row.mean() for row in rows]).mean()


def _mean_over_labels(
    rows: torch.Tensor, labels: torch.Tensor, num_items: Optional[torch.Tensor | int]
) -> torch.Tensor:
    counted = labels != -100
    count = num_items if num_items is not None else counted.sum().clamp_min(1)
    return (rows * counted).sum() / count
