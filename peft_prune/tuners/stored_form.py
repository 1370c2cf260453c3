"""The end of training: what was trained becomes mask and values in their stored form."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import Any, Optional

import torch

from ..masks.codec import describe_mask, describe_values, encode_mask, load_values, mask_to_blocks
from ..masks.fingerprint import fingerprint
from ..masks.values import encode_values
from .state import AdapterState


@dataclass
class FinalForm:
    """What a final adapter holds of one layer.

    Args:
        info (`dict`): what the config records.
        mask (`torch.Tensor`): the mask as it is stored: uint8, one dimension.
        values (`torch.Tensor`, *optional*): the kept values as they are stored: uint8, one dimension.
    """

    info: dict[str, Any]
    mask: torch.Tensor
    values: Optional[torch.Tensor] = None


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

    def final_form(self, adapter_name: str) -> FinalForm:
        """Mask and values of an adapter in their stored form. Nothing is changed yet.

        Raises:
            ValueError: a value cannot be stored, the layer is merged.
        """
        block, config = self.block(adapter_name), self.pruning_config[adapter_name]
        if config.gated:  # scores have moved since the mask was found, and gates follow from the scores alone
            self.renew(adapter_name)
        mask = self.get_mask(adapter_name)
        # the zeros of a base may be parts of blocks
        whole = block != (1, 1) and not config.from_existing_zeros
        info, stored = self.stored_form(mask, block if whole else None)
        if not config.stores_values:
            return FinalForm(info, stored)
        matrix = self.adapted(adapter_name, self.matrix).detach()
        try:
            values = encode_values(matrix, mask, config.value_dtype)
        except ValueError as error:
            raise ValueError(f"{self.module_name!r}: {error}") from error
        return FinalForm(info | {"values": describe_values(values, config.value_dtype)}, stored, values)

    def become_final(self, adapter_name: str, form: FinalForm) -> None:
        """Replace what is trained by what [`final_form`] has made."""
        # what FSDP and DeepSpeed manage is theirs to take away; it is no longer read, and not saved
        trained = () if adapter_name in self.shards else self.adapter_layer_names
        for name in (*trained, self.prefix + "progress", "penalty_grad"):
            if adapter_name in getattr(self, name):
                del getattr(self, name)[adapter_name]
        if form.values is not None:
            self.values[adapter_name] = form.values.to(self.weight.device)
        self.set_mask(adapter_name, form.mask)

    def set_mask(self, adapter_name: str, stored: torch.Tensor) -> None:
        """Give an adapter its final mask, in its stored form."""
        self.mask[adapter_name] = stored.to(self.weight.device)
        if adapter_name in self.held("bits"):
            del self.held("bits")[adapter_name]
        self._masks.pop(adapter_name, None)
        self._values.pop(adapter_name, None)
        self.cached_weight.clear()
        self.mask_bits(adapter_name)  # now, so that compiled forward passes find it

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
