"""The end of training: scores become masks."""

from __future__ import annotations

import math
import warnings
from typing import Optional

from torch import nn

from ..config import PruningConfig
from ..layers.final import FinalForm
from ..layers.layer import PruningLayer, pruning_layers
from ..layers.sharding import check_wrapping, gathered
from ..recipe import Moment
from ..selection.topk import check_ranked
from ..storage.codec import VERSION
from .own_config import own_config
from .schedule import trained_adapters
from .sparsity_reached import asked_sparsity, differs, reachable_sparsity, sparsity, unreachable
from .start import check_started


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
    check_started(adapters, "finalize")
    # everything is encoded, and may fail, before the first layer is changed
    forms = {name: _final_forms(model, name, layers) for name, layers in adapters.items()}
    for name, layers in adapters.items():
        config = own_config(model, name)
        tell_sparsity(name, layers, config)
        switch_over(name, layers, config, forms[name])


def switch_over(name: str, layers: list[PruningLayer], config: PruningConfig, forms: list[FinalForm]) -> None:
    """Replace what is trained by what was encoded, and record it in the adapter's own config."""
    config.mask_info = {layer.module_name: form.info for layer, form in zip(layers, forms, strict=True)}
    config.finalized, config.mask_format = True, VERSION
    for layer, form in zip(layers, forms, strict=True):
        layer.become_final(name, form)


def _final_forms(model: nn.Module, name: str, layers: list[PruningLayer]) -> list[FinalForm]:
    check_wrapping(model, layers)
    recipe = layers[0].host[name].recipe
    if recipe.chosen_layer_by_layer:
        for layer in gathered(layers, recipe.needs_weights):
            check_ranked(layer.ranking(name))
    return [layer.final_form(name) for layer in gathered(layers, True)]


def tell_sparsity(name: str, layers: list[PruningLayer], config: PruningConfig) -> None:
    """Have the config say what the masks remove, and warn if that is not what was asked for."""
    reached, wanted = sparsity(layers, name), asked_sparsity(name, layers)
    if wanted is None:
        config.sparsity, rule = reached, layers[0].host[name].recipe.rule
        least = sum(rule.least_removed(layer, name) for layer in layers) / sum(math.prod(m.shape) for m in layers)
        in_part = reached < least and differs(reached, least, name, layers)
        if rule.expects_removal and (reached < _NEXT_TO_NOTHING or in_part):
            warnings.warn(
                f"Adapter {name!r} is finalized at sparsity {reached:.4f}, and "
                + _why_so_little(name, layers[0], reached),
                UserWarning,
                stacklevel=3,
            )
        return
    if not differs(reached, wanted, name, layers):
        return
    scheduled = name in layers[0].progress
    step, total = layers[0].steps(name) if scheduled else (-1, 0)
    ended_early = (
        scheduled and not 0 < total <= step and differs(reached, reachable_sparsity(name, layers), name, layers)
    )
    config.sparsity = reached
    if not config.init_weights:
        return
    if ended_early:
        when = f"the schedule stands at step {step} of {total}" if step >= 0 else "nobody has advanced the schedule"
        why = (
            f"{when}. Train to the end, or call peft_prune.update_schedule(model, total_steps, total_steps) before "
            "finalize"
        )
    elif scheduled:
        why = layers[0].host[name].recipe.rule.why_missed() or unreachable(config)
    else:
        why = layers[0].host[name].recipe.rule.why_missed() or "only whole units are kept. Ask for what can be reached"
    warnings.warn(
        f"Adapter {name!r} is finalized at sparsity {reached:.4f}, not at the {wanted:.4f} asked for: {why}.",
        UserWarning,
        stacklevel=3,
    )


def _why_so_little(name: str, layer: PruningLayer, reached: float) -> str:
    """Why little or nothing was removed, and what to do."""
    step, total = layer.steps(name)
    if layer.host[name].recipe.moment is Moment.ONCE:
        how = "never pruned" if reached < _NEXT_TO_NOTHING else "pruned in part only"
        return (
            f"was {how}: its schedule stands at step {step} of {total}. Train on, or call "
            "peft_prune.prune_once(model) first."
        )
    return (
        "its training removed next to nothing. Where scores are compared with a threshold, the penalty pushes them "
        f"below it: raise penalty={layer.config(name).penalty!r}, train for more steps, or use a method that is told "
        "the sparsity."
    )
