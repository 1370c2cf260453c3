"""What ranks whole heads and neurons: it says in which order those of a layer go."""

from __future__ import annotations

from typing import Any, ClassVar, Optional

import numpy as np
import torch
from torch import nn

from ..structure.sites import Site
from .base import Importance


class UnitImportance(Importance):
    """Ranks the heads or neurons of each attention and feed-forward network of a model.

    Args:
        seed (`int`): of what is drawn at random.
    """

    seed: int
    # whether heights are losses of the model, so that those of all layers, of heads and of neurons can be compared
    comparable: ClassVar[bool] = False

    def order(
        self, model: nn.Module, site: Site, seen: Any, generator: torch.Generator
    ) -> tuple[np.ndarray, np.ndarray]:
        """Heights, ascending, and the unit that goes at each; both of shape (units - 1,).

        Args:
            model (`nn.Module`): the model that the site is in.
            site ([`Site`]): heads or neurons.
            seen (*optional*): what calibration has noted of their outputs, digested.
            generator (`torch.Generator`): for what is drawn at random.
        """
        raise NotImplementedError

    def digest(self, layer: Any, name: str, seen: Any) -> Any:
        """What is kept of a layer when its block has been seen: of what the observer has noted, of how many tokens that
        is, and of how much the model's predictions depend on the layer's output, see [`output_sensitivity`]."""
        return seen

    def order_again(self, layer: Any, name: str, count: int) -> Optional[torch.Tensor]:
        """The units that go when a layer is seen behind pruned ones: int64, (count,); `None`: the choice stands.

        Args:
            layer ([`PruningLayer`]): the layer; `layer.host[name].seen` is the Gram matrix of its inputs.
            name (`str`): the adapter.
            count (`int`): how many units go.
        """
        return None
