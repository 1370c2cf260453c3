"""What the host knows of an adapter in one layer; tensors that are saved or trained are PEFT's dictionaries."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Optional

import torch

from ..selection.granularity import Granularity
from ..selection.warm_start import LastThreshold


if TYPE_CHECKING:
    from ..recipe import Recipe


@dataclass
class Host:
    """
    Attributes:
        config ([`PruningConfig`]): the adapter's configuration.
        recipe ([`Recipe`]): what the configuration means.
        granularity ([`Granularity`]): what is kept or removed as one in this matrix.
        updated (`bool`): whether the layer is among those with an update.
        pruned (`bool`): whether it is among those that are pruned.
        rows (`torch.Tensor`, *optional*): rows that are updated: int64; `None` for all.
        units (`torch.Tensor`, *optional*): columns of each head or neuron: int64, shape (units, columns of a unit).
        start: where scores of low rank start.
        threshold ([`LastThreshold`]): of the last selection, which makes the next one faster.
        counted (`tuple`, *optional*): `progress`, its version, and what the host knows it to hold.
        unpacked (`tuple`, *optional*): a final mask as it is stored, its version, and the mask in bits.
        values (`torch.Tensor`, *optional*): decoded kept values: float32, shape (out, in).
        rewritten (`torch.Tensor`, *optional*): values that calibration has found, as they will be stored: uint8.
        penalty_armed (`bool`): whether the next backward pass is to add the penalty's gradient.
        sharded (`bool`): whether FSDP or DeepSpeed manages what is trained, see `sharding.py`.
        allotted (`float`, *optional*): sparsity that calibration gives the layer, where layers differ by what is seen.
        seen: what calibration has noted of the layer's inputs, until a mask is chosen by it.
        first_seen (`torch.Tensor`, *optional*): a few trained numbers as they were at first.
    """

    config: Any
    recipe: Recipe
    granularity: Granularity
    updated: bool = True
    pruned: bool = True
    rows: Optional[torch.Tensor] = None
    units: Optional[torch.Tensor] = None
    start: Any = None
    threshold: LastThreshold = field(default_factory=LastThreshold)
    counted: Optional[tuple[torch.Tensor, int, list[Any]]] = None
    unpacked: Optional[tuple[torch.Tensor, int, torch.Tensor]] = None
    values: Optional[torch.Tensor] = None
    rewritten: Optional[torch.Tensor] = None
    penalty_armed: bool = False
    sharded: bool = False
    allotted: Optional[float] = None
    seen: Any = None
    first_seen: Optional[torch.Tensor] = None

    def drop_decoded(self) -> None:
        """Let go of what was decoded from stored tensors, or is not stored yet."""
        self.unpacked = self.values = self.rewritten = None
