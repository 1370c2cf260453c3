"""What updates share whose kept values are stored in the end."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from ..storage.codec import describe_values, load_values
from ..storage.values import encode_values
from .base import Update


# torch before 2.7 cannot tell
_is_exporting = getattr(torch.compiler, "is_exporting", torch.compiler.is_compiling)


@dataclass(frozen=True)
class StoredValues(Update):
    """An update of which a final adapter holds the kept values.

    Args:
        value_dtype (`str`): how they are stored, see [`encode_values`].
    """

    value_dtype: str = "float32"

    stored = ("values",)
    stores = "mask, and the kept values"

    def add(self, layer: Any, name: str) -> None:
        """Room for the values of a final adapter: uint8, of the size that the record says; else what is trained."""
        if not layer.config(name).finalized:
            self.add_trained(layer, name)
            return
        info = layer.record(name)
        if "values" in info:
            layer.held("values")[name] = layer.empty_bytes(info["values"]["bytes"])

    def add_trained(self, layer: Any, name: str) -> None:
        """Give an adapter what is trained; nothing by default."""

    def inside(self, layer: Any, name: str, matrix: torch.Tensor) -> torch.Tensor:
        """The kept values once they are final; what the update makes of the matrix before."""
        if name in layer.held("values"):
            if layer.host[name].values is None and _is_exporting():  # its tensors are fake
                raise RuntimeError(
                    f"The values of {layer.module_name!r} have not been decoded yet. Call the model once before "
                    "torch.export."
                )
            return self.kept_values(layer, name).to(matrix.dtype)
        return super().inside(layer, name, matrix)

    def delta(self, layer: Any, name: str) -> torch.Tensor:
        """Of a final adapter, the difference of the kept values from the base weight: float32, shape (out, in)."""
        if name not in layer.held("values"):
            return super().delta(layer, name)
        return (self.kept_values(layer, name) - layer.matrix.detach().float()) * layer.get_mask(name)

    def final(self, layer: Any, name: str, mask: torch.Tensor) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
        """The kept values in their stored form."""
        updated = self.inside(layer, name, layer.matrix)
        matrix = layer.host[name].recipe.importance.settled(layer, name, updated).detach()
        stored = self.encode(layer, matrix, mask)
        return {"values": describe_values(stored, self.value_dtype)}, {"values": stored}

    def encode(self, layer: Any, matrix: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """Values of a matrix at the places of a mask as they are stored: uint8, one dimension.

        Raises:
            ValueError: a value cannot be stored; the message names the module.
        """
        try:
            return encode_values(matrix, mask, self.value_dtype)
        except ValueError as error:
            raise ValueError(f"{layer.module_name!r}: {error}") from error

    @torch.compiler.disable
    def kept_values(self, layer: Any, name: str) -> torch.Tensor:
        """Kept values of a final adapter as a matrix: float32, shape (out, in), decoded once."""
        host, stored = layer.host[name], layer.held("values")[name]
        if host.values is None or host.values.device != stored.device:
            info = layer.record(name)["values"]
            with torch.inference_mode(False), torch.no_grad():
                host.values = load_values(layer.module_name, stored, layer.get_mask(name), info)
        return host.values
