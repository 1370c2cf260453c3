"""What every rule has: how many weights stay, and which."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any, ClassVar, Optional

import torch

from ..selection.granularity import spread


Count = int | torch.Tensor  # a tensor, int64 and 0-dim, where only the device knows the number


class Rule:
    """Says how many weights each layer keeps, and picks them by an importance.

    Rules that compare layers or units across a model override [`choose_all`] instead.
    """

    label: ClassVar[str] = ""
    # whether it asks the importance
    ranks: ClassVar[bool] = True
    # whether the sparsity comes out of it, instead of being given
    finds_sparsity: ClassVar[bool] = False
    # whether it is a failure if next to nothing is removed
    expects_removal: ClassVar[bool] = False
    # whether layers are compared with each other, so that all have to be seen before the first mask is chosen
    across_layers: ClassVar[bool] = False
    # whether blocks are given sparsities by what calibration sees of them, before the first mask is chosen
    by_outliers: ClassVar[bool] = False
    # whether it looks at the base weights, whatever the importance does
    needs_weights: ClassVar[bool] = False
    # whether whole heads or neurons may go, so that merging makes the model smaller
    structured: ClassVar[bool] = False
    # whether it looks at calibration data itself, whatever the importance does
    reads_activations: bool = False
    # whether the zeros of a mask may cut through its units
    cuts_units: ClassVar[bool] = False

    def counts(self, name: str, layers: list[Any], step: int, total_steps: int) -> Sequence[Optional[Count]]:
        """Weights that each layer keeps at a step of training; `None` for as many as now."""
        return [None] * len(layers)

    def why_missed(self) -> str:
        """Why a sparsity was missed at the end of its schedule, and what to do; empty where only whole units can."""
        return ""

    def least_removed(self, layer: Any, name: str) -> float:
        """Weights of a layer that are removed, at least and on average, once it has been pruned as it was asked to."""
        return 0.0

    def at_first(self, layer: Any, name: str) -> int:
        """Weights that a layer keeps before training."""
        return layer.shape[0] * layer.shape[1]

    def count(self, layer: Any, name: str, density: float) -> int:
        """Weights that a layer keeps at a density: whole units, and one at least."""
        return layer.host[name].granularity.count(density, layer.shape)

    def units(self, layer: Any, name: str, ranking: torch.Tensor, kept: Count) -> torch.Tensor:
        """Which units stay, `kept` of them: bool, the shape of `ranking`."""
        host = layer.host[name]
        return host.granularity.units(ranking, kept, host.threshold)

    def choose(self, layer: Any, name: str) -> torch.Tensor:
        """The mask of one layer (bool, shape (out, in)): the most important units, as many as it keeps."""
        height, width = block = layer.block(name)
        kept = layer.kept_unread(name) // (height * width)
        if isinstance(kept, int) and kept == layer.unit_count(name):
            return torch.ones(layer.shape, dtype=torch.bool, device=layer.weight.device)
        ranking = layer.host[name].recipe.importance.rank(layer, name)
        return spread(self.units(layer, name, ranking, kept), block)

    def shares(self, model: Any, name: str, layers: list[Any]) -> dict[str, float]:
        """What calibration reports of the current masks: `sparsity` by default."""
        sizes = [layer.shape[0] * layer.shape[1] for layer in layers]
        return {"sparsity": 1.0 - sum(int(layer.get_mask(name).sum()) for layer in layers) / sum(sizes)}

    def check(self, model: Any, name: str, layers: list[Any]) -> None:
        """Raise `ValueError` if what is to be chosen later cannot be chosen in this model."""

    def check_base(self, model: Any, modules: Collection[str]) -> None:
        """Raise `ValueError` if it cannot be kept to in this base model, when an adapter for these modules is made."""

    def removed_first(self, model: Any, name: str, layers: list[Any], batches: Any) -> set[str]:
        """Layers of which nothing stays, chosen by themselves before others are looked at: names of modules."""
        return set()

    def removes_more(self, model: Any, name: str, layers: list[Any]) -> bool:
        """Whether anything has to go beside what the current masks have removed."""
        return True

    def solve(self, layer: Any, name: str) -> tuple[torch.Tensor, Optional[torch.Tensor]]:
        """The mask of one layer at calibration, and new values (float, shape (out, in)) if the rule finds any."""
        return self.choose(layer, name), None

    def choose_all(self, model: Any, name: str, layers: list[Any], seen: Any) -> dict[str, torch.Tensor]:
        """Masks of all layers by module name, for what is chosen once.

        Args:
            model (`nn.Module`): the model that the layers belong to.
            name (`str`): the adapter.
            layers (`list`): its layers.
            seen: what observers saw of each layer in calibration, by module name; `None` without.
        """
        return {layer.module_name: self.choose(layer, name) for layer in layers}
