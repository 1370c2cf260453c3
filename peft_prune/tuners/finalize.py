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
from .sparsity_reached import asked_sparsity, differs, reachable_sparsity, unreachable
from .stored_form import FinalForm


_NEXT_TO_NOTHING = 0.01


def finalize(model: nn.Module, adapter_name: Optional[str] = None) -> None:
    """Make the masks final: scores are dropped, and each mask is stored in 1 bit a weight or less.

    Outputs stay the same, but for the rounding of kept values by a `value_dtype` below float32. `PruningCallback` calls
    this at the end of training.

    Args:
        model (`nn.Module`): any model that contains pruning layers.
        adapter_name (`str`, *optional*): adapter to finalize, by default all active ones that are not final yet.

    Raises:
        ValueError: there is no adapter left to finalize, or something that was trained cannot be stored. Nothing is
            changed then.
    """
    adapters = trained_adapters(model)
    if adapter_name is not None:
        adapters = {adapter_name: [m for m in pruning_layers(model, adapter_name) if adapter_name in m.progress]}
    if not any(adapters.values()):
        raise ValueError(
            f"finalize: no adapter with trained scores found (adapter_name={adapter_name!r}). It is final already, not "
            "active, or not there."
        )
    # everything is encoded, and may fail, before the first layer is changed
    forms = {name: _final_forms(model, name, layers) for name, layers in adapters.items()}
    for name, layers in adapters.items():
        config = own_config(model, name)
        _tell_sparsity(name, layers, config)
        config.mask_info = {layer.module_name: form.info for layer, form in zip(layers, forms[name], strict=True)}
        config.finalized, config.mask_format = True, VERSION
        for layer, form in zip(layers, forms[name], strict=True):
            layer.become_final(name, form)


def _final_forms(model: nn.Module, name: str, layers: list[PruningLayer]) -> list[FinalForm]:
    check_wrapping(model, layers)
    config = layers[0].pruning_config[name]
    for layer in gathered(layers, config.needs_weights):
        if layer.has_scores(name) or name in layer.update:
            check_ranked(layer.ranking(name))
    return [layer.final_form(name) for layer in gathered(layers, True)]


def _tell_sparsity(name: str, layers: list[PruningLayer], config: PruningConfig) -> None:
    """Have the config say what the masks remove, and warn if that is not what was asked for."""
    reached, wanted = sparsity(layers, name), asked_sparsity(name, layers)
    if wanted is None:
        config.sparsity = reached
        if config.expects_removal and reached < _NEXT_TO_NOTHING:
            warnings.warn(
                f"Adapter {name!r} is finalized at sparsity {reached:.4f}: its training removed next to nothing. "
                f"Where scores are compared with a threshold, the penalty pushes them below it: raise "
                f"penalty={config.penalty!r}, train for more steps, or give `sparsity` to a method that has it.",
                UserWarning,
                stacklevel=3,
            )
        return
    if not differs(reached, wanted, name, layers):
        return
    ended_early = differs(reached, reachable_sparsity(name, layers), name, layers)
    config.sparsity = reached
    if not config.init_weights:
        return
    if ended_early:
        step, total = layers[0].steps(name)
        when = f"the schedule stands at step {step} of {total}" if step >= 0 else "nobody has advanced the schedule"
        why = (
            f"{when}. Train to the end, or call peft_prune.update_schedule(model, total_steps, total_steps) before "
            "finalize"
        )
    else:
        why = unreachable(config)
    warnings.warn(
        f"Adapter {name!r} is finalized at sparsity {reached:.4f}, not at the {wanted:.4f} asked for: {why}.",
        UserWarning,
        stacklevel=3,
    )
