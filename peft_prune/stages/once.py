"""Pruning in the middle of training, at once or in stages."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Optional, Protocol, cast

from torch import nn
from torch.nn.parallel import DistributedDataParallel

from ..calibration.batches import model_inputs
from ..layers.layer import PruningLayer, pruning_layers
from ..layers.sharding import check_wrapping, refuse_sharded
from ..recipe import Moment
from ..rules.base import Rule
from .calibration_run import CalibrationRun
from .layer_by_layer import choose_layer_by_layer
from .sparsity_reached import asked_sparsity, sparsity
from .taken_back import taken_back_on_error


class _InStages(Protocol):
    """A rule that knows what it is on the way."""

    def partly(self, share: float) -> Rule: ...


def prune_once(model: nn.Module, adapter_name: Optional[str] = None, batches: Optional[Iterable[Any]] = None) -> float:
    """Prune now all that the config says. `update_schedule` and `PruningCallback` have done so at `config.prune_at`.

    Args:
        model (`nn.Module`): any model with an adapter that prunes once, such as [`DSEEConfig`]'s, and is not final.
        adapter_name (`str`, *optional*): by default the active adapter.
        batches (`Iterable`, *optional*): batches of training data, for methods that prune by what layers see.

    Returns:
        `float`: share of the weights of pruned modules that is removed.

    Raises:
        ValueError: there is no such adapter, or there are no batches for a method that needs them.
    """
    layers = pruning_layers(model)
    name = adapter_name or (layers[0].active_adapters[0] if layers else "")
    waiting = [layer for layer in pruning_layers(model, name) if name in layer.progress]
    if not waiting or waiting[0].host[name].recipe.moment is not Moment.ONCE:
        raise ValueError(
            f"prune_once: adapter_name={adapter_name!r} is no adapter that prunes once, such as DSEE's, or it is final."
        )
    check_wrapping(model, waiting)
    check_batches(name, waiting, batches, "prune_once")
    check_once(model, name, waiting)
    prune_partly(model, name, waiting, 1.0, batches)
    return sparsity([layer for layer in waiting if layer.host[name].pruned], name)


def prune_partly(
    model: nn.Module, name: str, layers: list[PruningLayer], share: float, batches: Optional[Iterable[Any]] = None
) -> None:
    """Choose masks by a share of the sparsity, if they remove more than those in force.

    Args:
        model (`nn.Module`): the model that the layers belong to.
        name (`str`): the adapter.
        layers (`list`): its layers.
        share (`float`): 1 for all that the config says, heads and neurons included.
        batches (`Iterable`, *optional*): of training data, for methods that prune by what layers see.
    """
    recipe = layers[0].host[name].recipe
    rule = cast(_InStages, recipe.rule).partly(share)
    if recipe.needs_activations:
        asked = asked_sparsity(name, layers)
        if share < 1.0 and asked is not None and sparsity(layers, name) > share * asked:
            return  # more was pruned by hand
        _calibrate_partly(CalibrationRun.of(_unwrapped(model), name, layers, batches, None), rule)
        return
    masks = rule.choose_all(_unwrapped(model), name, layers, None)
    kept = sum(int(mask.sum()) for mask in masks.values())
    if share < 1.0 and kept > sum(layer.kept(name) for layer in layers):
        return  # more was pruned by hand
    for layer in layers:
        mask = masks[layer.module_name].to(layer.weight.device)
        step, total = layer.steps(name)
        layer.set_kept(name, int(mask.sum()), max(0, step), total)  # pruned by hand, no schedule has to be advanced
        layer.set_bits(name, mask)


def _calibrate_partly(run: CalibrationRun, rule: Rule) -> None:
    """Choose masks, and values where the method finds any, by what layers see of the model as it is by now."""
    layers = list(run.layers.values())
    with taken_back_on_error(run.name, layers):
        choose_layer_by_layer(run, rule)


def check_batches(name: str, layers: list[PruningLayer], batches: Optional[Iterable[Any]], what: str) -> None:
    """Raise `ValueError` if an adapter prunes by what layers see, and there is nothing to show them."""
    if not layers[0].host[name].recipe.needs_activations:
        return
    refuse_sharded(layers, what, "This method needs it whole: train with DDP, ZeRO-1 or ZeRO-2, or in one process.")
    if isinstance(batches, Mapping):
        raise ValueError(
            f"{what}: batches is a single batch with the entries {list(batches)}. Pass a list of batches: "
            f"{what}(..., batches=[batch])."
        )
    if batches is None or isinstance(batches, Iterator):
        given = "no batches" if batches is None else f"batches={batches!r}, which can be read once only"
        raise ValueError(
            f"{what}: adapter {name!r} prunes by what its layers see, several times in a training, and was given "
            f"{given}. Use PruningTrainer, or pass a list of batches of training data: {what}(..., batches=batches)."
        )


def check_first_batch(
    model: nn.Module, name: str, layers: list[PruningLayer], batches: Optional[Iterable[Any]]
) -> None:
    """Raise `ValueError` if an adapter prunes by what layers see, and the first batch is none that the model takes."""
    if batches is None or not layers[0].host[name].recipe.needs_activations:
        return
    first = next(iter(batches), None)
    if first is None:
        raise ValueError(f"batches={batches!r} is empty. Pass a list of batches of training data.")
    model_inputs(_unwrapped(model), first, layers[0].weight.device)


def check_once(model: nn.Module, name: str, layers: list[PruningLayer]) -> None:
    """Raise `ValueError` if what an adapter is to prune cannot be pruned in this model."""
    layers[0].host[name].recipe.rule.check(_unwrapped(model), name, layers)


def _unwrapped(model: nn.Module) -> nn.Module:
    """The model in `DistributedDataParallel`, which hides the config."""
    return cast(nn.Module, model.module) if isinstance(model, DistributedDataParallel) else model
