"""The smallest go, in each matrix or in many together; then whole heads and neurons (DSEE, section 3.3)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from ..layers.sharding import all_gathered
from ..selection.topk import topk_mask
from ..structure.clustering import least_first
from ..structure.norms import unit_norms
from ..structure.sites import HEADS, Site, find_sites
from .base import Rule


@dataclass(frozen=True)
class Smallest(Rule):
    """Two thresholds, one for weights without an update, ranked by magnitude, and one for those with an update.

    Args:
        sparsity (`float`): share of the weights without update that goes.
        update_sparsity (`float`): share of the weights with update that goes.
        heads (`int`): heads that go in each layer, those whose queries and values are updated least.
        neuron_sparsity (`float`): share of the neurons of each feed-forward network that goes, by magnitude.
        by_matrix (`bool`): each matrix has thresholds of its own.
    """

    sparsity: float = 0.0
    update_sparsity: float = 0.0
    heads: int = 0
    neuron_sparsity: float = 0.0
    by_matrix: bool = False

    finds_sparsity = True
    needs_weights = True

    @property
    def label(self) -> str:  # type: ignore[override]
        """In words."""
        return f"top-k in the {'matrix' if self.by_matrix else 'model'}, and whole heads and neurons"

    def partly(self, share: float) -> Smallest:
        """The rule on the way: a share of the single weights, and no heads and neurons before all of them."""
        if share == 1.0:
            return self
        return Smallest(share * self.sparsity, share * self.update_sparsity, by_matrix=self.by_matrix)

    @property
    def structured(self) -> bool:  # type: ignore[override]
        """Whether whole heads or neurons go."""
        return self.heads > 0 or self.neuron_sparsity > 0

    @property
    def expects_removal(self) -> bool:  # type: ignore[override]
        """Whether anything was asked to go."""
        return bool(self.sparsity or self.update_sparsity or self.structured)

    def least_removed(self, layer: Any, name: str) -> float:
        """The single weights; of heads and neurons some may be among them."""
        if not layer.host[name].pruned:
            return 0.0
        rows = {updated: len(_rows(name, layer, updated)) for updated in (False, True)}
        return float((rows[False] * self.sparsity + rows[True] * self.update_sparsity) * layer.shape[1])

    def choose_all(self, model: Any, name: str, layers: list[Any], seen: Any) -> dict[str, torch.Tensor]:
        """Masks (bool, (out, in)) by module name."""
        with all_gathered(layers):
            masks = {layer.module_name: torch.ones(layer.shape, dtype=torch.bool) for layer in layers}
            pruned = [layer for layer in layers if layer.host[name].pruned]
            for updated, rate in ((False, self.sparsity), (True, self.update_sparsity)):
                parts = [(layer, _rows(name, layer, updated)) for layer in pruned]
                values = [(layer, rows, _rank(name, layer, updated)[rows]) for layer, rows in parts if len(rows)]
                for group in [[value] for value in values] if self.by_matrix else [values]:
                    _smallest_go(group, rate, masks)
            if self.structured:
                self._remove_units(model, name, layers, masks)
        return masks

    def check(self, model: Any, name: str, layers: list[Any]) -> None:
        """Raise `ValueError` if heads and neurons are to go, and cannot be found, ranked or masked in this model."""
        if not self.structured:
            return
        by_path = _by_path(model, layers)
        with all_gathered(layers):
            sites = self._sites(model)
        for site in sites:
            if site.output not in by_path or not by_path[site.output].host[name].pruned:
                raise ValueError(
                    f"heads_to_prune, neuron_sparsity: {site.output!r} is not among prune_target_modules. Add it."
                )
            if site.kind != HEADS:
                continue
            if self.heads >= site.units:
                raise ValueError(f"heads_to_prune={self.heads!r} must be fewer than the {site.units} of a layer.")
            if not _updated_modules(name, site, by_path):
                raise ValueError(
                    f"heads_to_prune: no projection of {site.module!r} is updated, so its heads cannot be ranked. Add "
                    "one to target_modules."
                )

    def _sites(self, model: Any) -> list[Site]:
        """Where heads or neurons are to go."""
        return [site for site in find_sites(model) if (self.heads if site.kind == HEADS else self.neuron_sparsity)]

    def _remove_units(self, model: Any, name: str, layers: list[Any], masks: dict[str, torch.Tensor]) -> None:
        by_path = _by_path(model, layers)
        for site in self._sites(model):
            if site.kind == HEADS:
                gone = _least_updated_heads(name, self.heads, site, by_path)
            else:
                _, order = least_first(unit_norms(model, site))
                gone = torch.from_numpy(order[: round(self.neuron_sparsity * site.units)].copy())
            masks[by_path[site.output].module_name][:, site.columns[gone].flatten()] = False


def _by_path(model: Any, layers: list[Any]) -> dict[str, Any]:
    paths = {id(module): path for path, module in model.named_modules()}
    return {paths[id(layer)]: layer for layer in layers}


def _rows(name: str, layer: Any, updated: bool) -> torch.Tensor:
    """Rows of a matrix that have an update, or that have none: of a fused one, keys have none."""
    has = torch.zeros(layer.shape[0], dtype=torch.bool)
    if layer.changes_weights(name):
        rows = layer.host[name].rows
        has[slice(None) if rows is None else rows] = True
    return (has == updated).nonzero().flatten()


def _rank(name: str, layer: Any, updated: bool) -> torch.Tensor:
    importance = layer.host[name].recipe.importance
    return importance.rank(layer, name) if updated else importance.of(layer, name, "weight")


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


def _updated_modules(name: str, site: Site, layers: Mapping[str, Any]) -> list[str]:
    return [module for module in site.rows if module in layers and layers[module].changes_weights(name)]


def _least_updated_heads(name: str, heads: int, site: Site, layers: Mapping[str, Any]) -> torch.Tensor:
    """Heads with the smallest sum of `|ΔW|` over their rows of queries and values."""
    total = torch.zeros(site.units)
    for module in _updated_modules(name, site, layers):
        change = layers[module].delta(name)
        total += change.detach().abs().sum(1).cpu()[site.rows[module]].sum(1)
    _, order = least_first(total)
    return torch.from_numpy(order[:heads].copy())
