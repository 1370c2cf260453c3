"""An update of every weight that stays: fine-tuning under a mask."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Optional

import torch
from torch import nn

from ..storage.codec import describe_values, load_values
from ..storage.values import encode_values
from .base import Update


@dataclass(frozen=True)
class Dense(Update):
    """`(W + U) ⊙ M`. In the end the kept values are stored, and `U` is dropped.

    Args:
        value_dtype (`str`): how kept values are stored, see [`encode_values`].
        random (`bool`): start at random instead of at 0, for tests.
    """

    value_dtype: str = "float32"
    random: bool = False

    label = "dense"
    stores = "mask, and the kept values"
    tensors = ("update",)
    stored = ("values",)
    watched = ("update",)
    trains_under_mask = True

    def add(self, layer: Any, name: str) -> None:
        """`update`: float32, shape (out, in); or `values`: uint8, of the size that the record says."""
        config = layer.config(name)
        if config.finalized:
            info = (config.mask_info or {})[layer.module_name]
            if "values" in info:
                layer.held("values")[name] = layer.empty_bytes(info["values"]["bytes"])
            return
        matrix = layer.matrix
        update = torch.zeros(matrix.shape, dtype=torch.float32, device=matrix.device)
        if self.random:
            update.normal_(0, float(matrix.detach().abs().mean()))
        layer.held("update")[name] = nn.Parameter(update)

    def addend(self, layer: Any, name: str) -> Optional[torch.Tensor]:
        """`U`, as long as it is trained."""
        held = layer.held("update")
        return held[name] if name in held and name in layer.progress else None

    def inside(self, layer: Any, name: str, matrix: torch.Tensor) -> torch.Tensor:
        """The kept values once they are final, `W + U` before."""
        if name in layer.held("values"):
            return self._kept_values(layer, name).to(matrix.dtype)
        return super().inside(layer, name, matrix)

    def delta(self, layer: Any, name: str) -> torch.Tensor:
        """`U`; of a final adapter the difference of the kept values from the base weight."""
        if name in layer.held("update"):
            return layer.held("update")[name]
        if name in layer.held("values"):
            matrix = layer.matrix.detach().float()
            return (self._kept_values(layer, name) - matrix) * layer.get_mask(name)
        return super().delta(layer, name)

    def final(self, layer: Any, name: str, mask: torch.Tensor) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
        """The kept values in their stored form."""
        updated = self.inside(layer, name, layer.matrix)
        matrix = layer.host[name].recipe.importance.settled(layer, name, updated).detach()
        try:
            stored = encode_values(matrix, mask, self.value_dtype)
        except ValueError as error:
            raise ValueError(f"{layer.module_name!r}: {error}") from error
        return {"values": describe_values(stored, self.value_dtype)}, {"values": stored}

    @torch.compiler.disable
    def _kept_values(self, layer: Any, name: str) -> torch.Tensor:
        """Kept values as a matrix: float32, shape (out, in), decoded once."""
        host, stored = layer.host[name], layer.held("values")[name]
        if host.values is None or host.values.device != stored.device:
            info = (host.config.mask_info or {})[layer.module_name]["values"]
            with torch.inference_mode(False), torch.no_grad():
                host.values = load_values(layer.module_name, stored, layer.get_mask(name), info)
        return host.values
