"""Distillation from a teacher: what the student's outputs are compared with."""

from __future__ import annotations

from typing import Any, Optional

import torch
import torch.nn.functional as F

from .divergence import token_divergence


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


def soft_binary_cross_entropy(student: torch.Tensor, teacher: torch.Tensor, temperature: float) -> torch.Tensor:
    """`τ² · KL(teacher/τ ‖ student/τ)` of each class, which is there or not, whatever the others are.

    Args:
        student (`torch.Tensor`): logits of any shape.
        teacher (`torch.Tensor`): logits, the same shape.
        temperature (`float`): τ.

    Returns:
        `torch.Tensor`: float32, that shape.
    """
    # a class that is there or not is two classes, the second with the logit 0
    student, teacher = (torch.stack([logits, torch.zeros_like(logits)], dim=-1) for logits in (student, teacher))
    return soft_cross_entropy(student, teacher, temperature)


def distillation_loss(
    student: Any,
    teacher: Any,
    temperature: float = 2.0,
    labels: Optional[torch.Tensor] = None,
    num_items: Optional[torch.Tensor | float] = None,
    problem_type: Optional[str] = None,
    overwrite_teacher: bool = False,
) -> torch.Tensor:
    """Distance of a student's outputs from a teacher's, for every head named below.

    Classification: soft cross entropy; with several labels at once, of each label separately. Regression: squared
    error. Token classification and language modelling: soft cross entropy over the positions whose label is not -100.
    Question answering: mean over start and end.

    Args:
        student: model output with `logits`, or `start_logits` and `end_logits`.
        teacher: the teacher's output for the same inputs.
        temperature (`float`): τ.
        labels (`torch.Tensor`, *optional*): shape (batch, positions), for heads that answer at every position. For a
            causal LM, each at the position that predicts it: shifted to the left by one.
        num_items (*optional*): number of labels in the whole accumulated batch, to divide the sum by; by default the
            mean over this one is taken.
        problem_type (`str`, *optional*): that of the model's config. By default one output is a regression, and several
            are `"single_label_classification"`.
        overwrite_teacher (`bool`): whether the teacher's logits are no longer needed. Those of token classification and
            language modelling are then overwritten, which saves memory of their size.

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
    if "start_logits" not in student and pairs[0][0].dim() == 3:
        weights = _weights(pairs[0][0], labels, num_items)
        return token_divergence(*pairs[0], weights, temperature, overwrite_teacher)
    if "start_logits" not in student and pairs[0][0].dim() == 2:  # one answer an example
        rows = [_of_examples(*pairs[0], temperature, problem_type)]
    else:
        rows = [soft_cross_entropy(ours, theirs, temperature) for ours, theirs in pairs]
    if num_items is not None and labels is not None and labels.numel() == rows[0].numel():
        return rows[0].sum() / num_items
    return torch.stack([row.mean() for row in rows]).mean()


def _of_examples(
    student: torch.Tensor, teacher: torch.Tensor, temperature: float, problem_type: Optional[str]
) -> torch.Tensor:
    """Distance for each example, or each of its outputs where these do not depend on each other."""
    if student.shape[-1] == 1 or problem_type == "regression":
        return (student.float() - teacher.float()).square()
    if problem_type == "multi_label_classification":
        return soft_binary_cross_entropy(student, teacher, temperature)
    return soft_cross_entropy(student, teacher, temperature)


def _weights(
    logits: torch.Tensor, labels: Optional[torch.Tensor], num_items: Optional[torch.Tensor | float]
) -> torch.Tensor:
    """What each position counts for: float32, shape (batch, positions)."""
    positions = logits.shape[:-1]
    if labels is None or labels.shape != positions:
        counted = torch.ones(positions, device=logits.device)
        if labels is None or labels.numel() != counted.numel():
            num_items = None
    else:
        counted = (labels != -100).to(logits.device, torch.float32)
    return counted / (num_items if num_items is not None else counted.sum().clamp_min(1))
