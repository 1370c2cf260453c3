"""Calibration: a look at a task's inputs, and the masks are there."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Optional, cast

import torch
from torch import nn
from transformers.utils.logging import tqdm

from ...masks.codec import VERSION
from ...structure.activations import collect_inputs
from ...structure.budget import Plan, choose_units
from ...structure.clustering import column_similarity, head_similarity, least_first, removal_order
from ...structure.flops import unit_macs
from ...structure.norms import unit_norms
from ...structure.sites import HEADS, Site, find_sites
from ..distributed import agreed, refuse_data_parallel, refuse_sharded
from ..layer import PruningLayer, pruning_layers
from ..own_config import own_config
from .config import PPruningConfig


def calibrate(
    model: nn.Module, dataloader: Optional[Iterable[Any]] = None, adapter_name: Optional[str] = None
) -> dict[str, float]:
    """Choose the heads and neurons that stay, and make the masks final.

    Runs the model on `config.num_samples` examples and compares the activations of `config.num_tokens` tokens of them;
    memory does not grow with the data. Adapters of other kinds stay in force meanwhile. Of several processes, all have
    to call it, and all get the choice of the first. Two progress bars show running and comparing;
    `transformers.utils.logging.disable_progress_bar()` switches them off.

    Args:
        model (`nn.Module`): any model with a [`PPruningConfig`] adapter that is not calibrated yet.
        dataloader (`Iterable`, *optional*): batches as the model takes them, mappings of tensors; labels are not
            needed. May be left out for `criterion="magnitude"` and `"random"`.
        adapter_name (`str`, *optional*): adapter to calibrate, by default the one that is not calibrated.

    Returns:
        `dict[str, float]`: shares that stay: `flops`, `heads` and `neurons`.

    Raises:
        ValueError: no adapter waits for calibration, there is no data, or one batch instead of several, the model is
            wrapped by `DataParallel`, or the budget cannot be met.
    """
    refuse_data_parallel(model)
    name, layers = _uncalibrated(model, adapter_name)
    config = cast(PPruningConfig, layers[0].pruning_config[name])
    if any(layer.merged for layer in layers):
        raise ValueError("calibrate: adapters are merged. Call model.unmerge_adapter() first.")
    if isinstance(dataloader, Mapping):  # iterated, it gives the names of its entries
        raise ValueError(
            f"calibrate: dataloader is a single batch with the entries {list(dataloader)}. Pass a list of batches: "
            "calibrate(model, [batch])."
        )
    if config.criterion == "similarity" and dataloader is None:
        raise ValueError(
            "calibrate(model, dataloader): criterion='similarity' needs a dataloader of the task's inputs."
        )
    refuse_sharded(layers, "calibrate")
    modules = {id(module): path for path, module in model.named_modules()}
    by_output = {site.output: site for site in find_sites(model)}
    sites = {modules[id(layer)]: by_output[modules[id(layer)]] for layer in layers}
    inputs = {}
    if config.criterion == "similarity":
        inputs = _collect(model, layers, sites, dataloader, config)
    generator = torch.Generator().manual_seed(config.seed)
    bar = tqdm(sites.items(), desc="calibrate: compare units", unit="layer", disable=not inputs)  # the others are quick
    plans = [_plan(model, site, inputs.get(path), config, generator) for path, site in bar]
    kept = agreed(choose_units(plans, config.keep_ratio, config.lambda_ffn))
    _set_masks(name, cast(PPruningConfig, own_config(model, name)), dict(zip(sites, layers, strict=True)), sites, kept)
    return _shares(plans, kept)


def _uncalibrated(model: nn.Module, adapter_name: Optional[str]) -> tuple[str, list[PruningLayer]]:
    waiting: dict[str, list[PruningLayer]] = {}
    done: set[str] = set()
    for layer in pruning_layers(model):
        for name, config in layer.pruning_config.items():
            if isinstance(config, PPruningConfig):
                if config.finalized:
                    done.add(name)
                else:
                    waiting.setdefault(name, []).append(layer)
    if adapter_name is None and len(waiting) == 1:
        adapter_name = next(iter(waiting))
    if adapter_name not in waiting:
        raise ValueError(_why_none(adapter_name, list(waiting), sorted(done)))
    return adapter_name, waiting[adapter_name]


def _why_none(asked: Optional[str], waiting: list[str], done: list[str]) -> str:
    if asked in done:
        return f"calibrate: adapter {asked!r} is calibrated already. To choose anew, add another P-pruning adapter."
    if not (waiting or done):
        return (
            "calibrate: this model has no P-pruning adapter. Add one: get_peft_model(model, "
            "PPruningConfig(keep_ratio=0.5))."
        )
    if asked is not None:
        return f"calibrate: adapter_name={asked!r} is no P-pruning adapter of this model. It has {waiting + done}."
    if waiting:
        return f"calibrate: several adapters wait for calibration, {waiting}. Say which one by adapter_name."
    return f"calibrate: {done} is calibrated already. To choose anew, add another P-pruning adapter."


def _collect(
    model: nn.Module, layers: list[PruningLayer], sites: dict[str, Site], dataloader: Any, config: PPruningConfig
) -> dict[str, torch.Tensor]:
    watched = {path: (layer, site.decoder) for (path, site), layer in zip(sites.items(), layers, strict=True)}
    for layer in layers:
        layer.enable_adapters(False)
    try:
        return collect_inputs(model, watched, dataloader, config.num_samples, config.num_tokens, config.seed)
    finally:
        for layer in layers:
            layer.enable_adapters(True)


def _plan(
    model: nn.Module,
    site: Site,
    activations: Optional[torch.Tensor],
    config: PPruningConfig,
    generator: torch.Generator,
) -> Plan:
    cost = unit_macs(model, site, config.sequence_length)
    if config.criterion == "random":
        heights, order = least_first(torch.rand(site.units, generator=generator))
    elif config.criterion == "magnitude":
        heights, order = least_first(unit_norms(model, site))
    else:
        assert activations is not None
        importance = activations.abs().mean(0).view(site.units, site.width).mean(1)
        if site.kind == HEADS:
            similarity = head_similarity(activations, site.width, config.head_similarity)
        else:
            similarity = column_similarity(activations)
        heights, order = removal_order(similarity, importance, config.linkage)
    return Plan(site, cost, heights, order)


def _set_masks(
    name: str,
    config: PPruningConfig,
    layers: dict[str, PruningLayer],
    sites: dict[str, Site],
    kept: dict[str, torch.Tensor],
) -> None:
    info, stored = {}, {}
    size = left = 0
    for path, layer in layers.items():
        site, (out_features, in_features) = sites[path], layer.shape
        columns = torch.zeros(in_features, dtype=torch.bool)
        columns[site.columns[kept[path]].flatten()] = True
        mask = columns.expand(out_features, in_features).contiguous()
        info[layer.module_name], stored[path] = layer.stored_form(mask, (out_features, site.width))
        size, left = size + mask.numel(), left + int(columns.sum()) * out_features
    config.mask_info, config.mask_format, config.finalized = info, VERSION, True
    config.sparsity = 1.0 - left / size
    for path, layer in layers.items():
        layer.set_mask(name, stored[path])


def _shares(plans: list[Plan], kept: dict[str, torch.Tensor]) -> dict[str, float]:
    total = sum(plan.cost * plan.site.units for plan in plans)
    shares = {"flops": sum(plan.cost * len(kept[plan.site.output]) for plan in plans) / total}
    for kind in ("heads", "neurons"):
        of_kind = [plan.site for plan in plans if plan.site.kind == kind]
        units = sum(site.units for site in of_kind)
        shares[kind] = sum(len(kept[site.output]) for site in of_kind) / units if units else 1.0
    return shares
