"""A budget of FLOPs or parameters over the heads and neurons of a model."""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any, Optional, Union, cast

import numpy as np
import torch
from transformers.utils.logging import tqdm

from ..layers.sharding import agreed
from ..structure.budget import Plan, choose_units
from ..structure.flops import unit_cost, unit_macs, unit_parameters
from ..structure.shapes import FREE, Shapes
from ..structure.sites import HEADS, Site, find_sites
from .base import Rule
from .whole_layers import WholeLayers


AUTO = "auto"
_PAPERS_RATIO = 5.0  # of P-pruning
_COUNTED = {"flops": "FLOPs", "parameters": "parameters"}


@dataclass(frozen=True)
class Budget(Rule):
    """Units go in their order until the budget is met.

    With λ, heads and neurons share out what goes as 1 : λ (P-pruning, Wang et al. 2024, section 3.3). Without, all are
    in one list, by loss per cost; where an importance says nothing of losses, layers lose equal shares of their units.
    `"auto"` is one list, but for losses in a model whose predictions are not tokens: then λ is 5. Such a model may be
    pruned before its head is trained, and losses do not show which heads a new task needs.

    Args:
        keep_ratio (`float`): share of the cost that stays.
        lambda_ffn (`float` or `"auto"`, *optional*): λ, how much more is taken from neurons than from heads.
        sequence_length (`int`): tokens of the sequence that FLOPs are counted for.
        budget (`str`): what is counted, `"flops"` or `"parameters"`.
        min_share (`float`): share of the units of each layer that stays in any case; at least one does.
        layers ([`WholeLayers`], *optional*): blocks that go as a whole, before the rest of the budget is met.
        shapes ([`Shapes`]): whether layers may keep different numbers of units.
    """

    keep_ratio: float = 0.5
    lambda_ffn: Union[float, str, None] = 5.0
    sequence_length: int = 128
    budget: str = "flops"
    min_share: float = 0.0
    layers: Optional[WholeLayers] = None
    shapes: Shapes = FREE

    finds_sparsity = True
    structured = True
    across_layers = True
    needs_weights = True

    @property
    def label(self) -> str:  # type: ignore[override]
        """In words."""
        what = "heads and neurons" if self.layers is None else "layers, heads and neurons"
        return f"{_COUNTED[self.budget]} budget over {what} of the model"

    @property
    def reads_activations(self) -> bool:  # type: ignore[override]
        """Whether blocks are chosen by calibration data."""
        return self.layers is not None

    def check_base(self, model: Any, modules: Collection[str]) -> None:
        """Raise `ValueError` if whole blocks have to go and cannot."""
        if self.layers is not None:
            self.layers.candidates(model, modules)

    def removed_first(self, model: Any, name: str, layers: list[Any], batches: Any) -> set[str]:
        """Layers of the blocks that go as a whole."""
        if self.layers is None:
            return set()
        outputs = {site.output: module for module, site in sites_of(model, layers).items()}
        return {outputs[output] for output in self.layers.removed(model, outputs, batches)}

    def removes_more(self, model: Any, name: str, layers: list[Any]) -> bool:
        """Whether the blocks that are gone leave anything to do."""
        sites = sites_of(model, layers)
        removed = self._removed(model, name, layers, sites)
        total = sum(site.units * self._cost(model, site) for site in sites.values())
        return sum(removed.values()) < math.floor((1 - self.keep_ratio) * total)

    def _removed(self, model: Any, name: str, layers: list[Any], sites: dict[str, Site]) -> dict[str, int]:
        """Cost of each layer whose mask keeps nothing, by module name."""
        gone = [layer.module_name for layer in layers if not layer.get_mask(name).any()]
        return {module: sites[module].units * self._cost(model, sites[module]) for module in gone}

    def _cost(self, model: Any, site: Site) -> int:
        return unit_cost(model, site, self.budget, self.sequence_length)

    def choose_all(self, model: Any, name: str, layers: list[Any], seen: Any) -> dict[str, torch.Tensor]:
        """Masks (bool, (out, in)) by module name: columns of removed units are `False`.

        A layer whose mask keeps nothing is gone, and counts as removed.
        """
        sites = sites_of(model, layers)
        removed = self._removed(model, name, layers, sites)
        importance = layers[0].host[name].recipe.importance
        generator = torch.Generator().manual_seed(importance.seed)
        ratio = self._ratio(model, importance.comparable)
        plans = []
        left = [module for module in sites if module not in removed]
        for module in tqdm(left, desc="calibrate: compare units", unit="layer", disable=not seen):  # others are quick
            heights, order = importance.order(model, sites[module], (seen or {}).get(module), generator)
            plans.append(self._plan(model, sites[module], heights, order, importance.comparable, ratio))
        cost = sum(removed.values())
        what = _COUNTED[self.budget]
        kept = agreed(choose_units(plans, self.keep_ratio, ratio, what, cost, self.shapes))
        masks = {}
        for layer in layers:
            site = sites[layer.module_name]
            units = kept.get(site.output, torch.zeros(0, dtype=torch.int64))
            masks[layer.module_name] = _columns(layer, site.columns[units])
        return masks

    def _ratio(self, model: Any, comparable: bool) -> Optional[float]:
        """λ for this model; none for one list."""
        if self.lambda_ffn != AUTO:
            return cast(Optional[float], self.lambda_ffn)
        return _PAPERS_RATIO if comparable and not _predicts_tokens(model) else None

    def _plan(
        self, model: Any, site: Site, heights: np.ndarray, order: np.ndarray, comparable: bool, ratio: Optional[float]
    ) -> Plan:
        """What may go, at heights that can be compared."""
        cost = self._cost(model, site)
        most = site.units - max(1, math.ceil(self.min_share * site.units))
        if comparable:
            heights = heights / cost
        elif ratio is None:
            heights = np.arange(1, len(order) + 1) / site.units
        return Plan(site, cost, heights[:most], order[:most])

    def solve(self, layer: Any, name: str) -> tuple[torch.Tensor, Optional[torch.Tensor]]:
        """As many units as before, chosen again by the inputs behind pruned layers."""
        host, mask = layer.host[name], layer.get_mask(name)
        alive = mask[0].cpu()[host.units[:, 0]]
        gone = int((~alive).sum())
        order = host.recipe.importance.order_again(layer, name, gone) if gone else None
        if order is None:
            return mask, None
        alive = torch.ones_like(alive)
        alive[order.cpu()] = False
        return _columns(layer, host.units[alive]), None

    def shares(self, model: Any, name: str, layers: list[Any]) -> dict[str, float]:
        """Shares that stay: `flops`, `parameters`, `heads` and `neurons`."""
        totals: dict[str, list[int]] = {key: [0, 0] for key in ("flops", "parameters", "heads", "neurons")}
        sites = sites_of(model, layers)
        for layer in layers:
            site = sites[layer.module_name]
            alive = int(layer.get_mask(name)[0].cpu()[site.columns[:, 0]].sum())
            costs = {"flops": unit_macs(model, site, self.sequence_length), "parameters": unit_parameters(model, site)}
            for key, cost in (costs | {"heads" if site.kind == HEADS else "neurons": 1}).items():
                totals[key][0] += cost * alive
                totals[key][1] += cost * site.units
        return {key: kept / total if total else 1.0 for key, (kept, total) in totals.items()}


def _columns(layer: Any, columns: torch.Tensor) -> torch.Tensor:
    """A mask (bool, shape (out, in)) that keeps some columns."""
    kept = torch.zeros(layer.shape[1], dtype=torch.bool)
    kept[columns.flatten()] = True
    return kept.expand(layer.shape).contiguous()


def _predicts_tokens(model: Any) -> bool:
    return hasattr(model, "get_output_embeddings") and model.get_output_embeddings() is not None


def sites_of(model: Any, layers: list[Any]) -> dict[str, Site]:
    """Site that ends in each layer, by module name."""
    paths = {id(module): path for path, module in model.named_modules()}
    by_output = {site.output: site for site in find_sites(model)}
    return {layer.module_name: by_output[paths[id(layer)]] for layer in layers}
