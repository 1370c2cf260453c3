"""A budget of FLOPs over the heads and neurons of a model (P-pruning, Wang et al. 2024, section 3.3)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from transformers.utils.logging import tqdm

from ..layers.sharding import agreed
from ..structure.budget import Plan, choose_units
from ..structure.flops import unit_macs
from ..structure.sites import HEADS, Site, find_sites
from .base import Rule


@dataclass(frozen=True)
class Budget(Rule):
    """Units go in their order until the FLOPs are met, shared out between heads and neurons as 1 : λ.

    Args:
        keep_ratio (`float`): share of the FLOPs that stays.
        lambda_ffn (`float`): λ, how much more is taken from neurons than from heads.
        sequence_length (`int`): tokens of the sequence that FLOPs are counted for.
    """

    keep_ratio: float = 0.5
    lambda_ffn: float = 5.0
    sequence_length: int = 128

    label = "FLOPs budget over heads and neurons of the model"
    finds_sparsity = True
    structured = True
    across_layers = True
    needs_weights = True

    def choose_all(self, model: Any, name: str, layers: list[Any], seen: Any) -> dict[str, torch.Tensor]:
        """Masks (bool, (out, in)) by module name: columns of removed units are `False`."""
        sites = sites_of(model, layers)
        importance = layers[0].host[name].recipe.importance
        generator = torch.Generator().manual_seed(importance.seed)
        plans = []
        bar = tqdm(sites.items(), desc="calibrate: compare units", unit="layer", disable=not seen)  # others are quick
        for module, site in bar:
            heights, order = importance.order(model, site, (seen or {}).get(module), generator)
            plans.append(Plan(site, unit_macs(model, site, self.sequence_length), heights, order))
        kept = agreed(choose_units(plans, self.keep_ratio, self.lambda_ffn))
        masks = {}
        for layer in layers:
            site = sites[layer.module_name]
            columns = torch.zeros(layer.shape[1], dtype=torch.bool)
            columns[site.columns[kept[site.output]].flatten()] = True
            masks[layer.module_name] = columns.expand(layer.shape).contiguous()
        return masks

    def shares(self, model: Any, name: str, layers: list[Any]) -> dict[str, float]:
        """Shares that stay: `flops`, `heads` and `neurons`."""
        units: dict[str, list[int]] = {"heads": [0, 0], "neurons": [0, 0], "flops": [0, 0]}
        for layer in layers:
            site = sites_of(model, [layer])[layer.module_name]
            alive = int(layer.get_mask(name)[0][site.columns[:, 0]].sum())
            cost = unit_macs(model, site, self.sequence_length)
            for key, factor in (("heads" if site.kind == HEADS else "neurons", 1), ("flops", cost)):
                units[key][0] += factor * alive
                units[key][1] += factor * site.units
        return {key: kept / total if total else 1.0 for key, (kept, total) in units.items()}


def sites_of(model: Any, layers: list[Any]) -> dict[str, Site]:
    """Site that ends in each layer, by module name."""
    paths = {id(module): path for path, module in model.named_modules()}
    by_output = {site.output: site for site in find_sites(model)}
    return {layer.module_name: by_output[paths[id(layer)]] for layer in layers}
