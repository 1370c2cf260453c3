"""A saved adapter, read without its base model."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from peft import PeftConfig
from peft.utils import load_peft_weights

from ..config import PruningConfig
from ..config_record import check_tensors
from ..storage.codec import MaskFormatError, check_stored, check_values, load_mask, stored_shape, stored_size
from .summary import LayerDensity, stored_densities


# weights that are unpacked whatever the number of bytes; above, as many for each stored byte: sparsity of 99.8 %
_FREELY, _WEIGHTS_A_BYTE = 2**25, 512


@dataclass(frozen=True)
class AdapterFile:
    """Config and tensors of a final adapter.

    Attributes:
        source (`str`): folder or Hub id.
        config ([`PruningConfig`]): the adapter's configuration.
        tensors (`dict[str, torch.Tensor]`): stored masks by module name, uint8.
        values (`dict[str, torch.Tensor]`): stored kept values by module name, uint8; empty if weights are the base's.
        others (`dict[str, torch.Tensor]`): all other stored tensors, such as a classifier, by key.
    """

    source: str
    config: PruningConfig
    tensors: dict[str, torch.Tensor]
    values: dict[str, torch.Tensor]
    others: dict[str, torch.Tensor]

    @property
    def rows(self) -> list[LayerDensity]:
        """What is kept of each matrix."""
        return stored_densities(self.config.mask_info or {})

    @property
    def other_bytes(self) -> int:
        """Bytes of what is stored beside the masks."""
        return sum(tensor.numel() * tensor.element_size() for tensor in self.others.values())

    @property
    def mask_bytes(self) -> int:
        """Bytes of all masks."""
        return sum(stored_size(info) for info in (self.config.mask_info or {}).values())

    @property
    def value_bytes(self) -> int:
        """Bytes of all kept values."""
        return sum(tensor.numel() for tensor in self.values.values())

    @property
    def entropy_bytes(self) -> float:
        """Bytes that independent bits of the same density per matrix take at least."""
        infos = (self.config.mask_info or {}).values()
        bits = (math.prod(stored_shape(info)) for info in infos)
        return sum(n * binary_entropy(row.density) / 8 for n, row in zip(bits, self.rows, strict=True))

    def mask(self, name: str) -> torch.Tensor:
        """Mask of a module: bool, shape (out, in)."""
        info = (self.config.mask_info or {})[name]
        return load_mask(name, self.tensors[name], info, self.config.mask_format)

    def bounded_mask(self, name: str) -> torch.Tensor:
        """As [`mask`], where there is no base model whose shapes bound the memory.

        Raises:
            MaskFormatError: the record's shape is out of all proportion to the bytes that are stored.
        """
        info = (self.config.mask_info or {})[name]
        size, stored = math.prod(stored_shape(info)), stored_size(info)
        if max(size, math.prod(info["shape"])) > _FREELY + _WEIGHTS_A_BYTE * stored:
            raise MaskFormatError(
                f"{name!r} is {tuple(info['shape'])} according to adapter_config.json, but only {stored} bytes are "
                "stored: too few to be unpacked without its base model. Check it with peft-prune verify first."
            )
        return self.mask(name)


def size_of_masks(adapter: AdapterFile) -> str:
    """Bytes of all masks in words, compared with the entropy where there is any: a dense mask has none."""
    share = adapter.mask_bytes / adapter.entropy_bytes if adapter.entropy_bytes >= 1 else math.inf
    of = f", {share:.3f} times the entropy of independent bits" if share < 10 else ""
    return f"{adapter.mask_bytes:,} bytes{of}"


def binary_entropy(p: float) -> float:
    """Bits of a bit that is set with probability `p`."""
    return 0.0 if p in (0, 1) else -p * math.log2(p) - (1 - p) * math.log2(1 - p)


def read_adapter(source: str) -> AdapterFile:
    """Read a final adapter from a folder or the Hub, and check its checksums.

    Args:
        source (`str`): folder or Hub id.

    Raises:
        ValueError: there is no pruning adapter, or its masks are not final.
        MaskFormatError: it is damaged.
    """
    config = PeftConfig.from_pretrained(source)
    if not isinstance(config, PruningConfig):
        raise ValueError(f"{source} holds a {config.peft_type} adapter, which is not a pruning method of peft_prune.")
    if not config.finalized:
        raise ValueError(f"{source} holds a training checkpoint. Masks are final after peft_prune.finalize(model).")
    method = str(config.peft_type.value).lower()  # type: ignore[union-attr]
    kinds: dict[str, dict[str, torch.Tensor]] = {f".{method}_mask": {}, f".{method}_values": {}}
    others = {}
    stored = load_peft_weights(source, device="cpu")
    for key, tensor in stored.items():
        suffix = next((suffix for suffix in kinds if key.endswith(suffix)), None)
        if suffix is None:
            others[key] = tensor
        else:
            kinds[suffix][key.removeprefix("base_model.model.").removesuffix(suffix)] = tensor
    tensors, values = kinds.values()
    for name, info in (config.mask_info or {}).items():
        if name not in tensors:
            raise MaskFormatError(f"{source}: the adapter file holds no mask for {name!r}.")
        check_stored(name, tensors[name], info)
        if "values" in info:
            if name not in values:
                raise MaskFormatError(f"{source}: the adapter file holds no values for {name!r}.")
            check_values(name, values[name], info["values"])
    if extra := sorted(tensors.keys() - (config.mask_info or {}).keys()):
        raise MaskFormatError(f"{source}: the adapter file holds a mask for {extra[0]!r}, which the config does not.")
    check_tensors(config, stored)
    return AdapterFile(str(source), config, tensors, values, others)
