"""Advancing sparsity and penalty. It walks modules, so it works however the adapter got into the model."""

from __future__ import annotations

import math
from collections.abc import Sequence
from numbers import Integral
from typing import Any, Optional

import torch
from torch import nn

from ..config import PruningConfig
from ..masks.allocation import allocate_by_score, allocate_globally
from ..masks.device import on_cpu
from ..masks.penalty import sigmoid_penalty
from ..masks.schedule import Schedule
from .distributed import check_wrapping, gathered
from .layer import PruningLayer, pruning_layers


Count = int | torch.Tensor  # a tensor, int64 and 0-dim, where only the device knows the number


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
    active = [(layer.pruning_config, name) for layer in layers for name in layer.active_adapters]
    if not any(configs[name].trains for configs, name in active if name in configs):
        return (
            "the masks of this method are not trained. Calibrate them, call model.merge_and_unload(), and train what "
            "it returns like any model."
        )
    return (
        "the model's masks are final already, and a mask without scores cannot be trained. Start a new adapter, or go "
        "on from a checkpoint that was saved before they were final."
    )


def module_kind(name: str) -> str:
    """Kind of a module: its name without numbers, the same for all queries, for all keys, and so on."""
    return ".".join(part for part in name.split(".") if not part.isdigit())


def update_schedule(
    model: nn.Module, step: int, total_steps: Optional[int] = None, grad_scale: float = 1.0
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

    Returns:
        `dict[str, float]`: `sparsity` (of all target weights) and `penalty_lambda` of the first active adapter. On an
            accelerator `sparsity` is a 0-dim tensor if it would have to be waited for; `float` reads it.

    Raises:
        ValueError: there is nothing to advance, the number of steps is unknown, or `step` is beyond it.
    """
    adapters = trained_adapters(model)
    if not adapters:
        raise ValueError(f"update_schedule has no schedule to advance: {why_nothing_trains(model)}")
    reports = [_update_adapter(model, name, layers, step, total_steps, grad_scale) for name, layers in adapters.items()]
    return reports[0]


def _update_adapter(
    model: nn.Module,
    name: str,
    layers: list[PruningLayer],
    step: int,
    total_steps: Optional[int],
    grad_scale: float,
) -> dict[str, float]:
    config = layers[0].pruning_config[name]
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
    report = type(layers[0]).advance(model, name, layers, step, total)
    if report is not None:
        return report
    renewed = step % config.mask_interval == 0 or step == total
    counts = kept_weights(name, layers, step, total) if renewed else [None] * len(layers)
    for layer, kept in zip(gathered(layers, config.needs_weights), counts, strict=True):
        layer.set_kept(name, kept, step, total)
        if renewed:
            layer.renew(name)
    weight = _penalty_weight(config, step, total)
    if weight and config.learns_scores:
        for layer in layers:
            layer.arm_penalty(name, grad_scale * weight / (len(layers) * layer.score_count(name)))
    return {"sparsity": _sparsity_unread(layers, name), "penalty_lambda": weight}


def penalty(model: nn.Module) -> float:
    """The penalty in force, `λ · R` with `R` the mean over matrices of `mean(sigmoid(S))`: a number to log.

    Its gradient is seen to by [`update_schedule`]; do not add it to a loss.
    """
    total = 0.0
    for name, layers in trained_adapters(model).items():
        config = layers[0].pruning_config[name]
        step, steps = layers[0].steps(name)
        if config.penalty and step >= 0 and config.learns_scores:
            whole = gathered(layers, config.needs_weights)
            means = [sigmoid_penalty(layer.ranking(name).detach(), config.penalty_offset) for layer in whole]
            mean = torch.stack(means).mean()
            total += _penalty_weight(config, step, steps) * float(mean)
    return total


def _penalty_weight(config: PruningConfig, step: int, total_steps: int) -> float:
    return Schedule(0.0, config.penalty, curve=config.penalty_schedule).at(step, total_steps)


def kept_weights(name: str, layers: list[PruningLayer], step: int, total_steps: int) -> Sequence[Optional[Count]]:
    """Weights that each layer keeps at a step: schedule and allocation together; `None` for as many as now."""
    config = layers[0].pruning_config[name]
    if config.from_existing_zeros:
        return [None] * len(layers)
    threshold = config.score_threshold_at(step, total_steps)
    if threshold is not None:
        return [_above(layer, name, threshold, config.min_density) for layer in gathered(layers)]
    densities = [
        1.0 - config.sparsity_schedule_for(layer.target_sparsity(name)).at(step, total_steps) for layer in layers
    ]
    counts: list[Count] = [
        layer.granularity[name].count(d, layer.shape) for d, layer in zip(densities, layers, strict=True)
    ]
    shared = [i for i, layer in enumerate(layers) if layer.own_sparsity(name) is None]
    if config.allocation == "local" or not shared:
        return counts
    areas = {math.prod(layers[i].block(name)) for i in shared}
    if len(areas) > 1:
        raise ValueError(
            f"allocation={config.allocation!r} compares blocks, which here differ in size ({min(areas)} to "
            f"{max(areas)} weights). Use allocation='local', or target matrices of one shape."
        )
    density = densities[shared[0]]
    # one after another: scores of low rank are made, and those of several processes gathered, when they are asked for
    alike = [layers[i] for i in shared]
    rankings = (layer.ranking(name) for layer in gathered(alike, config.needs_weights))
    if config.allocation == "global":
        allocated = allocate_globally(list(rankings), density)
    else:
        kinds = [module_kind(layers[i].module_name) for i in shared]
        allocated = allocate_by_score(rankings, kinds, density, config.temperature)
    for i, count in zip(shared, allocated.tolist() if on_cpu(allocated) else allocated, strict=True):
        counts[i] = count * min(areas)
    return counts


def _above(layer: PruningLayer, name: str, threshold: float, min_density: float) -> Count:
    """Weights whose score is above a threshold, and a least share of the matrix in any case."""
    scores = layer.ranking(name)
    units = (scores > threshold).sum().clamp(min=math.ceil(min_density * scores.numel()))
    return (int(units) if on_cpu(units) else units) * math.prod(layer.block(name))


def _sparsity_unread(layers: list[PruningLayer], name: str) -> Any:
    """[`sparsity`], as a 0-dim tensor where it would have to be waited for."""
    counts = [layer.kept_unread(name) for layer in layers]
    on_device = [count for count in counts if isinstance(count, torch.Tensor)]
    if not on_device:
        return sparsity(layers, name)
    total = sum(layer.shape[0] * layer.shape[1] for layer in layers)
    known = sum(count for count in counts if isinstance(count, int))
    return 1.0 - (torch.stack([count.to(on_device[0].device) for count in on_device]).sum() + known) / total


def sparsity(layers: list[PruningLayer], adapter_name: str) -> float:
    """Share of the weights of some layers that an adapter removes."""
    total = sum(layer.shape[0] * layer.shape[1] for layer in layers)
    return 1.0 - sum(layer.kept(adapter_name) for layer in layers) / total
