"""The end of training: what was trained becomes mask and values in their stored form."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any, Optional

import torch

from ..masks.codec import describe_mask, describe_values, encode_mask, load_values, mask_to_blocks
from ..masks.fingerprint import fingerprint
from ..masks.values import encode_values
from .state import AdapterState


class StoredForm(AdapterState):
    """An [`AdapterState`] that can be made final."""

    quantized = False  # whether the base weight is

    @abstractmethod
    def adapted(self, name: str, matrix: torch.Tensor) -> torch.Tensor:
        """What an adapter makes of a matrix (out, in) in inference, and when it is merged."""

    def applied(self, name: str, matrix: torch.Tensor) -> torch.Tensor:
        """What an adapter makes of a matrix (out, in) in inference: what is merged, unless a method merges less."""
        return self.adapted(name, matrix)

    def check_stored_tensor(self, name: str, kind: str, found: torch.Tensor) -> None:
        """Raise `MaskFormatError` if a tensor of a file has the right shape and values that cannot be; for methods."""

    @abstractmethod
    def _apply_weight(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """What the base layer computes of its input, with another weight in its own layout."""

    def mask_block(self, adapter_name: str) -> Optional[tuple[int, int]]:
        """Rows and columns of the blocks that the final mask is stored in, `None` for single weights."""
        info = (self.pruning_config[adapter_name].mask_info or {})[self.module_name]
        return tuple(info["block"]) if "block" in info else None

    def finalize(self, adapter_name: str) -> dict[str, Any]:
        """Replace what is trained by mask and values in their stored form, and return what the config records."""
        block, config = self.block(adapter_name), self.pruning_config[adapter_name]
        matrix = self.adapted(adapter_name, self.matrix).detach() if config.stores_values else None
        mask = self.get_mask(adapter_name)
        # the zeros of a base may be parts of blocks
        whole = block != (1, 1) and not config.from_existing_zeros
        info = self.set_mask(adapter_name, mask, block if whole else None)
        if matrix is not None:
            info |= self.set_values(adapter_name, matrix, mask, config.value_dtype)
        # what FSDP and DeepSpeed manage is theirs to take away; it is no longer read, and not saved
        trained = () if adapter_name in self.shards else self.adapter_layer_names
        for name in (*trained, self.prefix + "progress", "penalty_grad"):
            if adapter_name in getattr(self, name):
                del getattr(self, name)[adapter_name]
        return info

    def set_mask(
        self, adapter_name: str, mask: torch.Tensor, block: Optional[tuple[int, int]] = None
    ) -> dict[str, Any]:
        """Give an adapter its final mask, and return what the config records of it.

        Args:
            adapter_name (`str`): the adapter.
            mask (`torch.Tensor`): bool, shape (out, in).
            block (`tuple[int, int]`, *optional*): rows and columns of the blocks that the mask keeps or removes whole.
        """
        info, stored = self.stored_form(mask, block)
        self._masks.pop(adapter_name, None)
        self.mask[adapter_name] = stored.to(self.weight.device)
        return info

    def set_values(self, adapter_name: str, matrix: torch.Tensor, mask: torch.Tensor, dtype: str) -> dict[str, Any]:
        """Give an adapter its kept values, those of a matrix (out, in), and return what the config records of them."""
        stored = encode_values(matrix, mask, dtype)
        self._values.pop(adapter_name, None)
        self.values[adapter_name] = stored.to(self.weight.device)
        return {"values": describe_values(stored, dtype)}

    def stored_form(
        self, mask: torch.Tensor, block: Optional[tuple[int, int]] = None
    ) -> tuple[dict[str, Any], torch.Tensor]:
        """What the config records of a mask of this layer, and the bytes that are stored."""
        if self.merged:  # the fingerprint would be that of the merged weight
            raise ValueError(f"{self.module_name!r} is merged. Call model.unmerge_adapter() first.")
        stored = encode_mask(mask if block is None else mask_to_blocks(mask, block))
        info = describe_mask(stored, mask, block)
        # what a quantised weight stands for is not what the mask will be compared with on the base model as it was
        return (info if self.quantized else info | {"weights": fingerprint(self.matrix)}), stored

    def changes_weights(self, adapter_name: str) -> bool:
        """Whether an adapter has weights of its own, and not only a mask."""
        return adapter_name in self.values or adapter_name in self.update

    def _kept_values(self, name: str) -> torch.Tensor:
        """Kept values as a matrix: float32, shape (out, in), decoded once."""
        if name not in self._values or self._values[name].device != self.values[name].device:
            self._decode_values(name)
        return self._values[name]

    @torch.compiler.disable
    @torch.inference_mode(False)
    @torch.no_grad()
    def _decode_values(self, name: str) -> None:
        info = (self.pruning_config[name].mask_info or {})[self.module_name]["values"]
        self._values[name] = load_values(self.module_name, self.values[name], self.get_mask(name), info)
