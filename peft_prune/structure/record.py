"""What was removed from a compact model, as its config remembers it."""

from __future__ import annotations

import copy
from typing import Any, Optional

import numpy as np
import torch
from torch import nn


FIELD = "peft_prune_structure"  # of the model's config


def write_record(before: Optional[dict[str, Any]], kept: torch.Tensor, units: int) -> dict[str, Any]:
    """Record of a site: the number of its units at first, and which of them are kept, as bits.

    Args:
        before (`dict`, *optional*): the record so far, if units were removed earlier.
        kept (`torch.Tensor`): int64, one dimension, ascending: units that stay, among those that were there.
        units (`int`): number of units that were there.
    """
    if before is not None:
        kept, units = read_record(before)[kept], before["units"]
    bits = np.zeros(units, dtype=bool)
    bits[kept.numpy()] = True
    return {"units": units, "kept": np.packbits(bits, bitorder="little").tobytes().hex()}


def read_record(record: Any) -> torch.Tensor:
    """Which units are kept: int64, one dimension, ascending.

    Raises:
        ValueError: the record is damaged.
    """
    try:
        units, packed = record["units"], bytes.fromhex(record["kept"])
        if not isinstance(units, int) or units < 1 or len(packed) != (units + 7) // 8:
            raise ValueError
        bits = np.unpackbits(np.frombuffer(packed, dtype=np.uint8), bitorder="little")
    except (TypeError, KeyError, ValueError) as error:
        raise ValueError(
            f"{FIELD}: {record!r:.80} is no record of kept units. The model's config.json is damaged."
        ) from error
    if not bits[:units].any() or bits[units:].any():
        raise ValueError(f"{FIELD}: a record keeps no unit, or one that was never there. config.json is damaged.")
    return torch.from_numpy(bits[:units].nonzero()[0])


def change_config(model: nn.Module, **fields: Any) -> None:
    """Give a model a config of its own with other fields: other models may have been made from the same one.

    Args:
        model (`nn.Module`): the model; of a model without a config nothing is recorded.
        **fields: what is set, for instance the record.
    """
    shared: Any = getattr(model, "config", None)
    if shared is None:
        return
    own = copy.deepcopy(shared)
    for name, value in fields.items():
        setattr(own, name, value)
    for module in model.modules():
        if getattr(module, "config", None) is shared:
            module.config = own
