"""FLAP (An et al. 2023, arXiv 2312.11983), for comparison: units that fluctuate least go, and leave a bias behind."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
import torch

from peft_prune.structure.budget import Plan, choose_units
from peft_prune.structure.flops import unit_macs, unit_parameters
from peft_prune.structure.sites import HEADS, Site, find_sites


def flap(model: Any, batches: Iterable[dict[str, torch.Tensor]], keep_ratio: float, length: int) -> dict[str, float]:
    """Zero the columns of units in place, and put their mean output into biases; batches are without padding.

    A column's score is the variance of its input times the squared norm of the weights that it meets, standardised in
    each layer; a unit's is the mean over its columns. Units of all layers are in one list.

    Returns:
        `dict[str, float]`: shares that stay, and `removed`: the number of parameters that need not be stored.
    """
    sites = find_sites(model)
    moments = _moments(model, sites, batches)
    plans = []
    for site in sites:
        mean, variance = moments[site.output]
        columns = variance * model.get_submodule(site.output).weight.detach().double().square().sum(0)
        scores = ((columns - columns.mean()) / columns.std())[site.columns].mean(1)
        heights, order = scores.sort()
        plans.append(Plan(site, unit_macs(model, site, length), heights.numpy()[:-1], order.numpy()[:-1]))
    kept = choose_units(plans, keep_ratio, None)
    totals = {"flops": [0, 0], "parameters": [0, 0], "heads": [0, 0], "neurons": [0, 0]}
    for site, plan in zip(sites, plans, strict=True):
        stays = kept[site.output]
        gone = site.columns[np.setdiff1d(np.arange(site.units), stays.numpy())].flatten()
        _leave_bias(model.get_submodule(site.output), gone, moments[site.output][0])
        costs = {"flops": plan.cost, "parameters": unit_parameters(model, site)}
        for key, cost in (costs | {"heads" if site.kind == HEADS else "neurons": 1}).items():
            totals[key][0] += cost * len(stays)
            totals[key][1] += cost * site.units
    removed = totals["parameters"][1] - totals["parameters"][0]
    return {key: left / whole for key, (left, whole) in totals.items()} | {"removed": removed}


@torch.no_grad()
def _leave_bias(layer: torch.nn.Linear, gone: torch.Tensor, mean: torch.Tensor) -> None:
    bias = layer.weight[:, gone].double() @ mean[gone]
    bias = bias if layer.bias is None else bias + layer.bias
    layer.bias = torch.nn.Parameter(bias.to(layer.weight.dtype))
    layer.weight[:, gone] = 0


@torch.no_grad()
def _moments(
    model: Any, sites: list[Site], batches: Iterable[dict[str, torch.Tensor]]
) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Mean and variance of each input of the layers that units feed: float64, shape (in,)."""
    sums: dict[str, Any] = {site.output: [0, 0.0, 0.0] for site in sites}

    def note(key: str) -> Any:
        def hook(module: Any, args: tuple) -> None:
            x = args[0].flatten(0, -2).double()
            sums[key] = [a + b for a, b in zip(sums[key], (len(x), x.sum(0), x.square().sum(0)), strict=True)]

        return hook

    handles = [model.get_submodule(key).register_forward_pre_hook(note(key)) for key in sums]
    for batch in batches:
        model(**batch)
    for handle in handles:
        handle.remove()
    return {key: (s / n, (ss - s.square() / n) / (n - 1)) for key, (n, s, ss) in sums.items()}
