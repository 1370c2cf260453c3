"""Warnings that are given once, and the one about a schedule that nobody advances."""

from __future__ import annotations

import warnings

import torch


_warned: set[str] = set()


def warn_once(topic: str, message: str) -> None:
    """Warn about a topic once a process, and not once for each of the model's layers."""
    if topic not in _warned:
        _warned.add(topic)
        warnings.warn(message, UserWarning, stacklevel=3)


class ScheduleWatch:
    """Notices that scores are trained while nobody advances the schedule."""

    def __init__(self) -> None:
        self._first_seen: dict[str, torch.Tensor] = {}

    def look(self, adapter_name: str, scores: torch.Tensor, step: int) -> None:
        """Compare a few scores with what they were at first, until the schedule moves from step -1.

        Values and not tensor versions tell whether an optimizer has been at work: fused ones do not count versions up.
        """
        if step >= 0 or "schedule" in _warned:
            return
        flat = scores.detach().reshape(-1)
        sample = flat[:: max(1, flat.numel() // 64)].clone()
        first_seen = self._first_seen.setdefault(adapter_name, sample)
        if not torch.equal(sample, first_seen.to(sample.device)):
            warn_once(
                "schedule",
                "Scores are being trained but nobody advances the sparsity schedule, so the model stays at its initial "
                "sparsity. Add PruningCallback() to the Trainer (PruningTrainer does), or call "
                "peft_prune.update_schedule(model, step, total_steps) after each optimizer step.",
            )

    def forget(self, adapter_name: str) -> None:
        """Drop what is known of an adapter."""
        self._first_seen.pop(adapter_name, None)
