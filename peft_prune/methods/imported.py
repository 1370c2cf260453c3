"""The method that holds masks which were found in a sparse model: movement pruning, by the zeros that are there."""

from __future__ import annotations

from typing import Any, Optional

from ..config import PruningConfig
from ..tuner.model import PruningModel
from .movement import MovementPruningConfig, MovementPruningModel


TUNER: type[PruningModel] = MovementPruningModel


def targets_config(target_modules: Any, modules_to_save: Optional[list[str]]) -> PruningConfig:
    """A config that says which modules may have been pruned."""
    return MovementPruningConfig(
        from_existing_zeros=True, target_modules=target_modules, modules_to_save=modules_to_save
    )


def final_config(mask_info: dict[str, dict[str, Any]], value_dtype: Optional[str], **fields: Any) -> PruningConfig:
    """The config of a final adapter, whose `sparsity` is what the masks remove.

    Args:
        mask_info (`dict`): records of the masks, by module name.
        value_dtype (`str`, *optional*): how values are stored; `None` if all weights that stay are the base's.
        **fields: further fields, such as `granularity`.
    """
    size = sum(info["shape"][0] * info["shape"][1] for info in mask_info.values())
    return MovementPruningConfig(
        from_existing_zeros=True,
        update="full" if value_dtype else "none",
        value_dtype=value_dtype or "float32",
        sparsity=1.0 - sum(info["kept"] for info in mask_info.values()) / size,
        finalized=True,
        mask_info=mask_info,
        inference_mode=True,
        **fields,
    )
