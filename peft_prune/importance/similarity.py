"""Heads and neurons that do what others do already, seen on activations (P-pruning, Wang et al. 2024)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Optional

import numpy as np
import torch

from ..calibration.observers import TokenSample
from ..structure.clustering import column_similarity, head_similarity, least_first, removal_order
from ..structure.norms import unit_norms
from ..structure.sites import HEADS, Site
from .units import UnitImportance


@dataclass(frozen=True)
class Similarity(UnitImportance):
    """The order in which the heads or neurons of a layer go.

    Args:
        criterion (`str`): `"similarity"`: of two like units the one with the smaller activations goes first. As
            baselines `"magnitude"`, the unit with the smallest weights, and `"random"`.
        matching (`str`): how the dimensions of two heads are matched, `"assignment"` or `"greedy"`.
        linkage (`str`): of the clusters: `"complete"`, `"average"` or `"single"`.
        seed (`int`): seed of `"random"`, and of the sample of tokens.
        num_tokens (`int`): tokens in the sample.
    """

    criterion: str = "similarity"
    matching: str = "assignment"
    linkage: str = "complete"
    seed: int = 0
    num_tokens: int = 200

    def observer(self, config: Any) -> TokenSample:
        """A sample of tokens, the same for all layers."""
        return TokenSample(self.num_tokens, self.seed)

    @property
    def label(self) -> str:  # type: ignore[override]
        """In words."""
        return "similarity of activations" if self.reads_activations else f"{self.criterion} of heads and neurons"

    @property
    def reads_activations(self) -> bool:  # type: ignore[override]
        """Whether calibration has to look at inputs."""
        return self.criterion == "similarity"

    def order(
        self, model: Any, site: Site, activations: Optional[torch.Tensor], generator: torch.Generator
    ) -> tuple[np.ndarray, np.ndarray]:
        """Heights, ascending, and the unit that goes at each; both of shape (units - 1,).

        Args:
            model (`nn.Module`): the model that the site is in.
            site ([`Site`]): heads or neurons.
            activations (`torch.Tensor`, *optional*): a sample of what they put out: shape (tokens, columns).
            generator (`torch.Generator`): for `"random"`.
        """
        if self.criterion == "random":
            return least_first(torch.rand(site.units, generator=generator))
        if self.criterion == "magnitude":
            return least_first(unit_norms(model, site))
        assert activations is not None
        importance = activations.abs().mean(0).view(site.units, site.width).mean(1)
        if site.kind == HEADS:
            similarity = head_similarity(activations, site.width, self.matching)
        else:
            similarity = column_similarity(activations)
        return removal_order(similarity, importance, self.linkage)
