"""The end of training: what was trained becomes mask and values in their stored form."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass, field
from typing import Any, Optional

import torch

from ..storage.codec import describe_mask, encode_mask, mask_to_blocks
from ..storage.fingerprint import fingerprint
from .masks import AdapterMasks


@dataclass
class FinalForm:
    """What a final adapter holds of one layer.

    Args:
        info (`dict`): what the config records.
        mask (`torch.Tensor`): the mask as it is stored: uint8, one dimension.
        others (`dict[str, torch.Tensor]`): further buffers by kind, such as the kept `"values"`.
    """

    info: dict[str, Any]
    mask: torch.Tensor
    others: dict[str, torch.Tensor] = field(default_factory=dict)


class FinalMasks(AdapterMasks):
    """[`AdapterMasks`] that can be made final."""

    quantized = False  # whether the base weight is

    @abstractmethod
    def _apply_weight(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """What the base layer computes of its input, with another weight in its own layout."""

    def mask_block(self, adapter_name: str) -> Optional[tuple[int, int]]:
        """Rows and columns of the blocks that the final mask is stored in, `None` for single weights."""
        info = self.record(adapter_name)
        return tuple(info["block"]) if "block" in info else None

    def final_form(self, adapter_name: str) -> FinalForm:
        """Mask and update of an adapter in their stored form. Nothing is changed yet.

        Raises:
            ValueError: a value cannot be stored, or the layer is merged.
        """
        recipe = self.host[adapter_name].recipe
        if recipe.importance.gates and adapter_name in self.progress:
            self.renew(adapter_name)  # scores have moved since the mask was found, and gates follow from these alone
        mask, block = self.get_mask(adapter_name), self.block(adapter_name)
        whole = block != (1, 1) and not recipe.rule.cuts_units
        info, stored = self.stored_form(mask, block if whole else None)
        of_update, others = recipe.update.final(self, adapter_name, mask)
        return FinalForm(info | of_update, stored, others)

    def become_final(self, adapter_name: str, form: FinalForm) -> None:
        """Replace what is trained by what [`final_form`] has made."""
        host = self.host[adapter_name]
        # what FSDP and DeepSpeed manage is theirs to take away; it is no longer read, and not saved
        dropped = () if host.sharded else set(self.trained_names) - set(host.recipe.update.kept_when_final())
        for name in (*(self.prefix + kind for kind in (*dropped, "progress", "start")), "penalty_grad"):
            if adapter_name in getattr(self, name):
                del getattr(self, name)[adapter_name]
        for kind, tensor in form.others.items():
            self.held(kind)[adapter_name] = tensor.to(self.weight.device)
        self.set_mask(adapter_name, form.mask)

    def set_mask(self, adapter_name: str, stored: torch.Tensor) -> None:
        """Give an adapter its final mask, in its stored form."""
        self.mask[adapter_name] = stored.to(self.weight.device)
        if adapter_name in self.held("bits"):
            del self.held("bits")[adapter_name]
        self.host[adapter_name].drop_decoded()
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
