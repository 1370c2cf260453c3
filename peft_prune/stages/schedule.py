"""Advancing sparsity and penalty. It walks modules, so it works however the adapter got into the model."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from numbers import Integral
from typing import Any, Optional

import torch
from torch import nn

from ..importance.penalty import sigmoid_penalty
from ..layers.layer import PruningLayer, pruning_layers
from ..layers.sharding import check_wrapping, gathered
from ..recipe import Moment
from .once import check_batches, check_first_batch, check_once, prune_partly
from .sparsity_reached import sparsity
from .start import check_started


def trained_adapters(model: nn.Module) -> dict[str, list[PruningLayer]]:
    """Layers of each active adapter whose masks are not final yet, by adapter name."""
    adapters: dict[str, list[PruningLayer]] = {}
    for layer in pruning_layers(model):
        for name in layer.active_adapters:
            if name in layer.progress:
                adapters.setdefault(name, []).append(layer)
    return adapters


def why_nothing_trains(model: nn.Module) -> str:
    """Why [`trained_adapters`] finds none, and what to do: the end of an error message."""
    layers = pruning_layers(model)
    if not layers:
        return (
            "the model contains no pruning adapter. Wrap the base model first: get_peft_model(base_model, "
            "SMPConfig(...))."
        )
    hosts = [layer.host[name] for layer in layers for name in layer.active_adapters if name in layer.host]
    if not any(host.recipe.trained for host in hosts):
        return (
            "the masks of this method are not trained. Calibrate them, call model.merge_and_unload(), and train what "
            "it returns like any model."
        )
    return (
        "the model's masks are final already, and a mask without scores cannot be trained. Start a new adapter, or go "
        "on from a checkpoint that was saved before they were final."
    )


def update_schedule(
    model: nn.Module,
    step: int,
    total_steps: Optional[int] = None,
    grad_scale: float = 1.0,
    batches: Optional[Iterable[Any]] = None,
) -> dict[str, float]:
    """Bring sparsity and penalty of the active adapters to where the schedule wants them.

    Call it once before training with `step=0` and after each optimizer step with the number of steps done, as AdaLoRA's
    `update_and_allocate`. `PruningCallback` does so inside a `Trainer`. The penalty needs nothing more: its gradient is
    added to that of the scores in the backward pass of the first forward pass after the call, so gradient accumulation
    does not change it.

    Args:
        model (`nn.Module`): any model that contains pruning layers.
        step (`int`): number of optimizer steps done.
        total_steps (`int`, *optional*): number of steps of the whole training; by default `config.total_steps`.
        grad_scale (`float`): factor by which the loss is scaled (fp16 gradient scaling), so that the penalty is too.
        batches (`Iterable`, *optional*): batches of training data, as for [`calibrate`], for methods that prune by what
            layers see: `MovementPruningConfig(variant="sparsegpt")`. Pass the same at each step.

    Returns:
        `dict[str, float]`: `sparsity` (of all target weights) and `penalty_lambda` of the first active adapter. On an
            accelerator `sparsity` is a 0-dim tensor if it would have to be waited for; `float` reads it.

    Raises:
        ValueError: there is nothing to advance, the number of steps is unknown, `step` is beyond it, or there are no
            batches for a method that needs them.
    """
    adapters = trained_adapters(model)
    if not adapters:
        raise ValueError(f"update_schedule has no schedule to advance: {why_nothing_trains(model)}")
    check_started(adapters, "update_schedule")
    reports = [
        _update_adapter(model, name, layers, step, total_steps, grad_scale, batches)
        for name, layers in adapters.items()
    ]
    return reports[0]


def _update_adapter(
    model: nn.Module,
    name: str,
    layers: list[PruningLayer],
    step: int,
    total_steps: Optional[int],
    grad_scale: float,
    batches: Optional[Iterable[Any]],
) -> dict[str, float]:
    config = layers[0].config(name)
    total = total_steps if total_steps is not None else config.total_steps
    if not isinstance(total, Integral) or total < 1:
        raise ValueError(
            f"total_steps={total!r}: update_schedule has to know how long training is. Set `total_steps` in the "
            "config, or pass update_schedule(model, step, total_steps)."
        )
    if not isinstance(step, Integral) or not 0 <= step <= total:
        raise ValueError(f"step={step!r} must be a whole number and lie between 0 and total_steps={total}.")
    if not 0 < grad_scale < math.inf:
        raise ValueError(f"grad_scale={grad_scale!r} must be the positive factor by which the loss is scaled, or 1.")
    merged = [layer.module_name for layer in layers if layer.merged]
    if merged:
        raise ValueError(
            f"update_schedule: adapters are merged into the base weights ({merged[0]!r} and others), so the masks of "
            f"adapter {name!r} are not what the model computes with. Call model.unmerge_adapter() before the schedule "
            "is advanced."
        )
    config.total_steps = int(total)  # NumPy's whole numbers are none to JSON
    check_wrapping(model, layers)
    at = _At(int(step), int(total), grad_scale, batches)
    weight = _ADVANCE[layers[0].host[name].recipe.moment](model, name, layers, at)
    return {"sparsity": _sparsity_unread(layers, name), "penalty_lambda": weight}


@dataclass(frozen=True)
class _At:
    """Where training is, and what a step is given."""

    step: int
    total_steps: int
    grad_scale: float
    batches: Optional[Iterable[Any]]


def _every_step(model: nn.Module, name: str, layers: list[PruningLayer], at: _At) -> float:
    """Renew masks, and arm the penalty for the next step; returns its λ."""
    config, recipe = layers[0].config(name), layers[0].host[name].recipe
    renewed = config.renews_at(at.step, at.total_steps)
    counts = recipe.rule.counts(name, layers, at.step, at.total_steps) if renewed else [None] * len(layers)
    for layer, kept in zip(gathered(layers, recipe.needs_weights), counts, strict=True):
        layer.set_kept(name, kept, at.step, at.total_steps)
        if renewed:
            layer.renew(name)
    weight = config.penalty_at(at.step, at.total_steps)
    if weight and recipe.importance.tensors:
        for layer in layers:
            layer.arm_penalty(name, at.grad_scale * weight / (len(layers) * layer.unit_count(name)))
    return weight


def _at_start(model: nn.Module, name: str, layers: list[PruningLayer], at: _At) -> float:
    """Find the masks before the first step, when base weights have been loaded for certain."""
    first = layers[0].steps(name)[0] < 0
    for layer in gathered(layers, first):
        layer.set_kept(name, None, at.step, at.total_steps)
        if first:
            layer.renew(name)
    return 0.0


def _at_stages(model: nn.Module, name: str, layers: list[PruningLayer], at: _At) -> float:
    """Prune when the schedule passes a step for it; in between only the step is noted."""
    stages, before = layers[0].config(name).stages(at.total_steps), layers[0].steps(name)[0]
    if before < max(stages):
        check_batches(name, layers, at.batches, "update_schedule")  # now, and not in the middle of training
    if before < 0:
        check_once(model, name, layers)
        check_first_batch(model, name, layers, at.batches)
    passed = [stage for stage in stages if before < stage <= at.step]
    if passed:
        prune_partly(model, name, layers, stages[max(passed)], at.batches)
    for layer in layers:
        layer.set_kept(name, None, at.step, at.total_steps)
    return 0.0


_ADVANCE = {Moment.EVERY_STEP: _every_step, Moment.START: _at_start, Moment.ONCE: _at_stages}


def penalty(model: nn.Module) -> float:
    """The penalty in force, `λ · R` with `R` the mean over matrices of `mean(sigmoid(S))`: a number to log.

    Its gradient is seen to by [`update_schedule`]; do not add it to a loss.
    """
    total = 0.0
    for name, layers in trained_adapters(model).items():
        config, recipe = layers[0].config(name), layers[0].host[name].recipe
        step, steps = layers[0].steps(name)
        if recipe.importance.tensors and config.penalty and step >= 0:
            whole = gathered(layers, recipe.needs_weights)
            offset = recipe.importance.penalty_offset
            means = [sigmoid_penalty(layer.ranking(name).detach(), offset) for layer in whole]
            total += config.penalty_at(step, steps) * float(torch.stack(means).mean())
    return total


def _sparsity_unread(layers: list[PruningLayer], name: str) -> Any:
    """[`sparsity`], as a 0-dim tensor where it would have to be waited for."""
    counts = [layer.kept_unread(name) for layer in layers]
    on_device = [count for count in counts if isinstance(count, torch.Tensor)]
    if not on_device:
        return sparsity(layers, name)
    total = sum(layer.shape[0] * layer.shape[1] for layer in layers)
    known = sum(count for count in counts if isinstance(count, int))
    return 1.0 - (torch.stack([count.to(on_device[0].device) for count in on_device]).sum() + known) / total
