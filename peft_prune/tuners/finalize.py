"""The end of training: scores become masks."""

from __future__ import annotations

import warnings
from typing import Optional

from torch import nn

from ..config import PruningConfig
from ..masks.codec import VERSION
from ..masks.selection import check_ranked
from .distributed import check_wrapping, gathered
from .layer import PruningLayer, pruning_layers
from .own_config import own_config
from .schedule import sparsity, trained_adapters


def finalize(model: nn.Module, adapter_name: Optional[str] = None) -> None:
    """Make the masks final: scores are dropped, and each mask is stored in 1 bit a weight or less.

    Outputs stay the same, but for the rounding of kept values by a `value_dtype` below float32. `PruningCallback` calls
    this at the end of training.

    Args:
        model (`nn.Module`): any model that contains pruning layers.
        adapter_name (`str`, *optional*): adapter to finalize, by default all active ones that are not final yet.

    Raises:
        ValueError: there is no adapter left to finalize.
    """
    adapters = trained_adapters(model)
    if adapter_name is not None:
        adapters = {adapter_name: [m for m in pruning_layers(model, adapter_name) if adapter_name in m.progress]}
    if not any(adapters.values()):
        raise ValueError(
            f"finalize: no adapter with trained scores found (adapter_name={adapter_name!r}). It is final already, not "
            "active, or not there."
        )
    for name, layers in adapters.items():
        check_wrapping(model, layers)
        config = own_config(model, name)
        _warn_if_target_missed(name, layers, config)
        for layer in gathered(layers, config.needs_weights):
            if layer.has_scores(name) or name in layer.update:
                check_ranked(layer.ranking(name))  # told before the first layer is changed
        config.mask_info = {layer.module_name: layer.finalize(name) for layer in gathered(layers, True)}
        config.finalized, config.mask_format = True, VERSION


def _warn_if_target_missed(name: str, layers: list[PruningLayer], config: PruningConfig) -> None:
    step, total = layers[0].steps(name)
    reached = sparsity(layers, name)
    if config.finds_sparsity:
        config.sparsity = reached
        return
    weights = [layer.shape[0] * layer.shape[1] for layer in layers]
    targets = [layer.target_sparsity(name) for layer in layers]
    wanted = sum(target * n for target, n in zip(targets, weights, strict=True)) / sum(weights)
    # blocks and n:m patterns may not be able to reach it
    counts = [layer.granularity[name].count(1.0 - t, layer.shape) for layer, t in zip(layers, targets, strict=True)]
    if abs(reached - (1.0 - sum(counts) / sum(weights))) > 1e-3 and config.init_weights:
        when = f"the schedule stands at step {step} of {total}" if step >= 0 else "nobody has advanced the schedule"
        warnings.warn(
            f"Adapter {name!r} is finalized at sparsity {reached:.4f}, not at the {wanted:.4f} asked for: {when}. "
            "Train to the end, or call peft_prune.update_schedule(model, total_steps, total_steps) before finalize.",
            UserWarning,
            stacklevel=3,
        )
