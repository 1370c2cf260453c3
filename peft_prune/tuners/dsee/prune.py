"""DSEE's second stage: pruned once, in the middle of training (Chen et al. 2023, section 3.3)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Optional, cast

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from ...masks.selection import topk_mask
from ...structure.clustering import least_first
from ...structure.norms import unit_norms
from ...structure.sites import HEADS, Site, find_sites
from ..distributed import all_gathered, check_wrapping
from ..layer import pruning_layers
from ..schedule import sparsity
from .config import DSEEConfig


def prune_once(model: nn.Module, adapter_name: Optional[str] = None) -> float:
    """Prune now what the config says. `update_schedule` and `PruningCallback` do so at `config.prune_at`.

    Args:
        model (`nn.Module`): any model with a [`DSEEConfig`] adapter that is not final.
        adapter_name (`str`, *optional*): by default the active adapter.

    Returns:
        `float`: share of the weights of pruned modules that is gone.

    Raises:
        ValueError: there is no such adapter.
    """
    layers: list[Any] = pruning_layers(model)
    name = adapter_name or (layers[0].active_adapters[0] if layers else "")
    model = _unwrapped(model)
    waiting = [
        layer for layer in layers if isinstance(layer.pruning_config.get(name), DSEEConfig) and name in layer.progress
    ]
    if not waiting:
        raise ValueError(f"prune_once: adapter_name={adapter_name!r} is no DSEE adapter that is not final.")
    config = cast(DSEEConfig, waiting[0].pruning_config[name])
    pruned = [layer for layer in waiting if config.prunes(layer.module_name)]
    check_wrapping(model, waiting)
    check_units(model, name, waiting)
    with all_gathered(waiting):
        masks = _choose(model, name, config, waiting, pruned)
    for layer in waiting:
        mask = masks[layer.module_name].to(layer.weight.device)
        layer.set_kept(name, int(mask.sum()), max(0, layer.steps(name)[0]), layer.steps(name)[1])
        layer.set_bits(name, mask)
    return sparsity(cast(Any, pruned), name)


def _choose(
    model: nn.Module, name: str, config: DSEEConfig, waiting: list[Any], pruned: list[Any]
) -> dict[str, torch.Tensor]:
    """Masks (bool, (out, in)) by module: one threshold for each of the two groups, then heads and neurons."""
    masks = {layer.module_name: torch.ones(layer.shape, dtype=torch.bool) for layer in waiting}
    rates = (config.sparsity, config.sparsity if config.update_sparsity is None else config.update_sparsity)
    for updated, rate in zip((False, True), rates, strict=True):
        parts = [(layer, _rows(name, layer, updated)) for layer in pruned]
        kind = config.importance if updated else "weight"
        values = [(layer, rows, importance(name, layer, kind)[rows]) for layer, rows in parts if len(rows)]
        _smallest_go(values, float(rate or 0), masks)
    if config.structured:
        _remove_units(model, name, config, waiting, masks)
    return masks


def check_units(model: nn.Module, name: str, layers: list[Any]) -> None:
    """Raise `ValueError` if heads and neurons are to go, and cannot be found, ranked or masked in this model."""
    config = layers[0].pruning_config[name]
    if not config.structured:
        return
    model = _unwrapped(model)
    by_path = _by_path(model, layers)
    with all_gathered(layers):
        sites = _sites(model, config)
    for site in sites:
        if site.output not in by_path or not config.prunes(by_path[site.output].module_name):
            raise ValueError(
                f"heads_to_prune, neuron_sparsity: {site.output!r} is not among prune_target_modules. Add it."
            )
        if site.kind != HEADS:
            continue
        if config.heads_to_prune >= site.units:
            raise ValueError(
                f"heads_to_prune={config.heads_to_prune!r} must be fewer than the {site.units} of a layer."
            )
        if not _updated_modules(name, site, by_path):
            raise ValueError(
                f"heads_to_prune: no projection of {site.module!r} is updated, so its heads cannot be ranked. Add one "
                "to target_modules."
            )


def _sites(model: nn.Module, config: DSEEConfig) -> list[Site]:
    """Where heads or neurons are to go."""
    return [
        site for site in find_sites(model) if (config.heads_to_prune if site.kind == HEADS else config.neuron_sparsity)
    ]


def _by_path(model: nn.Module, layers: list[Any]) -> dict[str, Any]:
    paths = {id(module): path for path, module in model.named_modules()}
    return {paths[id(layer)]: layer for layer in layers}


def _unwrapped(model: nn.Module) -> nn.Module:
    """The model in `DistributedDataParallel`, which hides the config."""
    return cast(nn.Module, model.module) if isinstance(model, DistributedDataParallel) else model


def _rows(name: str, layer: Any, updated: bool) -> torch.Tensor:
    """Rows of a matrix that have an update, or that have none: of a fused one, keys have none."""
    has = torch.zeros(layer.shape[0], dtype=torch.bool)
    if layer.changes_weights(name):
        rows = layer.updated_rows.get(name)
        has[slice(None) if rows is None else rows] = True
    return (has == updated).nonzero().flatten()


def importance(name: str, layer: Any, kind: str) -> torch.Tensor:
    """What decides about each weight of a matrix: float32, shape (out, in), on the CPU."""
    weight = layer.matrix.detach().float()
    if kind == "weight":
        return weight.abs().cpu()
    change = layer.delta(name).detach()
    return (change if kind == "update" else weight + change).abs().cpu()


def _smallest_go(
    parts: list[tuple[Any, torch.Tensor, torch.Tensor]], share: float, masks: dict[str, torch.Tensor]
) -> None:
    """Remove a share of the weights of some rows of some matrices, by one threshold over all of them."""
    if not (parts and share):
        return
    sizes = [values.numel() for _, _, values in parts]
    flat = torch.cat([values.flatten() for _, _, values in parts])
    kept = topk_mask(flat, round((1.0 - share) * len(flat)))
    for (layer, rows, values), part in zip(parts, kept.split(sizes), strict=True):
        masks[layer.module_name][rows] = part.view(values.shape)


def _remove_units(
    model: nn.Module, name: str, config: DSEEConfig, layers: list[Any], masks: dict[str, torch.Tensor]
) -> None:
    by_path = _by_path(model, layers)
    for site in _sites(model, config):
        if site.kind == HEADS:
            gone = _least_updated_heads(name, config, site, by_path)
        else:
            _, order = least_first(unit_norms(model, site))
            gone = torch.from_numpy(order[: round(config.neuron_sparsity * site.units)].copy())
        masks[by_path[site.output].module_name][:, site.columns[gone].flatten()] = False


def _updated_modules(name: str, site: Site, layers: Mapping[str, Any]) -> list[str]:
    return [module for module in site.rows if module in layers and layers[module].changes_weights(name)]


def _least_updated_heads(name: str, config: DSEEConfig, site: Site, layers: Mapping[str, Any]) -> torch.Tensor:
    """Heads with the smallest sum of `|ΔW|` over their rows of queries and values."""
    total = torch.zeros(site.units)
    for module in _updated_modules(name, site, layers):
        total += layers[module].delta(name).detach().abs().sum(1).cpu()[site.rows[module]].sum(1)
    _, order = least_first(total)
    return torch.from_numpy(order[: config.heads_to_prune].copy())
