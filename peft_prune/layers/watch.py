"""Warnings that are given once, and the one about a schedule that nobody advances."""

from __future__ import annotations

import warnings
from typing import Any

import torch

from .masks import not_started


_warned: set[str] = set()


def warn_once(topic: str, message: str) -> None:
    """Warn about a topic once a process, and not once for each of the model's layers."""
    if topic not in _warned:
        _warned.add(topic)
        warnings.warn(message, UserWarning, stacklevel=3)


def look_at_schedule(layer: Any, name: str) -> None:
    """Warn if an adapter is trained while nobody advances its schedule, and raise if its start is not known.

    A few trained numbers are compared with what they were at first, until the schedule moves from step -1. Values and
    not tensor versions tell whether an optimizer has been at work: fused ones do not count versions up.
    """
    if not layer.training or name not in layer.progress or torch.compiler.is_compiling():
        return
    if layer.waits_for_start(name):
        raise ValueError(f"Training cannot begin: {not_started(name, layer.config(name))}")
    if "schedule" in _warned:
        return
    host = layer.host[name]
    kinds = (*host.recipe.importance.tensors, *host.recipe.update.watched)
    watched = next((layer.held(kind)[name] for kind in kinds if name in layer.held(kind)), None)
    if watched is None or not host.config.init_weights or layer.steps(name)[0] >= 0:
        return
    flat = watched.detach().reshape(-1)
    sample = flat[:: max(1, flat.numel() // 64)].clone()
    if host.first_seen is None:
        host.first_seen = sample
    if not torch.equal(sample, host.first_seen.to(sample.device)):
        warn_once(
            "schedule",
            "Scores are being trained but nobody advances the sparsity schedule, so the model stays at its initial "
            "sparsity. Add PruningCallback() to the Trainer (PruningTrainer does), or call "
            "peft_prune.update_schedule(model, step, total_steps) after each optimizer step.",
        )
