"""Pruning in the middle of training, at once or in stages."""

from __future__ import annotations

from typing import Optional, cast

from torch import nn
from torch.nn.parallel import DistributedDataParallel

from ..layers.layer import PruningLayer, pruning_layers
from ..layers.sharding import check_wrapping
from ..recipe import Moment
from ..rules.smallest import Smallest
from .sparsity_reached import sparsity


def prune_once(model: nn.Module, adapter_name: Optional[str] = None) -> float:
    """Prune now all that the config says. `update_schedule` and `PruningCallback` have done so at `config.prune_at`.

    Args:
        model (`nn.Module`): any model with an adapter that prunes once, such as [`DSEEConfig`]'s, and is not final.
        adapter_name (`str`, *optional*): by default the active adapter.

    Returns:
        `float`: share of the weights of pruned modules that is removed.

    Raises:
        ValueError: there is no such adapter.
    """
    layers = pruning_layers(model)
    name = adapter_name or (layers[0].active_adapters[0] if layers else "")
    waiting = [layer for layer in pruning_layers(model, name) if name in layer.progress]
    if not waiting or waiting[0].host[name].recipe.moment is not Moment.ONCE:
        raise ValueError(
            f"prune_once: adapter_name={adapter_name!r} is no adapter that prunes once, such as DSEE's, or it is final."
        )
    check_wrapping(model, waiting)
    check_once(model, name, waiting)
    prune_partly(model, name, waiting, 1.0)
    return sparsity([layer for layer in waiting if layer.host[name].pruned], name)


def prune_partly(model: nn.Module, name: str, layers: list[PruningLayer], share: float) -> None:
    """Choose masks by a share of the sparsity, if they remove more than those in force.

    Args:
        model (`nn.Module`): the model that the layers belong to.
        name (`str`): the adapter.
        layers (`list`): its layers.
        share (`float`): 1 for all that the config says, heads and neurons included.
    """
    rule = cast(Smallest, layers[0].host[name].recipe.rule).partly(share)
    masks = rule.choose_all(_unwrapped(model), name, layers, None)
    kept = sum(int(mask.sum()) for mask in masks.values())
    if share < 1.0 and kept > sum(layer.kept(name) for layer in layers):
        return  # more was pruned by hand
    for layer in layers:
        mask = masks[layer.module_name].to(layer.weight.device)
        step, total = layer.steps(name)
        layer.set_kept(name, int(mask.sum()), max(0, step), total)  # pruned by hand, no schedule has to be advanced
        layer.set_bits(name, mask)


def check_once(model: nn.Module, name: str, layers: list[PruningLayer]) -> None:
    """Raise `ValueError` if what an adapter is to prune cannot be pruned in this model."""
    layers[0].host[name].recipe.rule.check(_unwrapped(model), name, layers)


def _unwrapped(model: nn.Module) -> nn.Module:
    """The model in `DistributedDataParallel`, which hides the config."""
    return cast(nn.Module, model.module) if isinstance(model, DistributedDataParallel) else model
