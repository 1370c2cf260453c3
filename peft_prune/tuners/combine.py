"""New masks from old ones: union, intersection, majority vote."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Sequence
from typing import Any, Optional, cast

import torch
from peft.utils.other import ModulesToSaveWrapper

from ..config import PruningConfig
from ..masks.codec import VERSION
from .layer import pruning_layers


COMBINATIONS = ("union", "intersection", "majority")


def combine_masks(masks: Sequence[torch.Tensor], how: str, weights: Sequence[float]) -> torch.Tensor:
    """Combine masks of one matrix.

    Args:
        masks (`Sequence[torch.Tensor]`): bool, the same shape.
        how (`str`): `"union"` keeps what any mask keeps, `"intersection"` what all keep, `"majority"` what more than
            half of the votes keep.
        weights (`Sequence[float]`): votes of each mask, for `"majority"`.

    Returns:
        `torch.Tensor`: bool, of that shape.
    """
    if how == "majority":
        votes = sum(mask.double() * weight for mask, weight in zip(masks, weights, strict=True))
        return votes > sum(weights) / 2  # type: ignore[operator, return-value]
    stacked = torch.stack(list(masks))
    return stacked.any(0) if how == "union" else stacked.all(0)


def add_combined_adapter(
    model: Any, adapters: list[str], weights: Optional[list[float]], adapter_name: str, combination_type: str
) -> None:
    """What [`PruningModel.add_weighted_adapter`] does to a tuner, and raises."""
    votes = _check_combination(model, adapters, weights, adapter_name, combination_type)
    if combination_type != "majority" and len(set(votes)) > 1:
        warnings.warn(
            f"weights={weights!r} have no effect with combination_type={combination_type!r}, where every mask counts "
            'the same. Use combination_type="majority" to weigh the masks, or leave weights out.',
            UserWarning,
            stacklevel=3,
        )
    config = cast(PruningConfig, copy.deepcopy(model.peft_config[adapters[0]]))
    info, stored = {}, {}
    for layer in pruning_layers(model, adapters[0]):
        mask = combine_masks([layer.get_mask(name) for name in adapters], combination_type, votes)
        blocks = {str(i): i for i in (layer.mask_block(name) for name in adapters)}
        block = next(iter(blocks.values())) if len(blocks) == 1 else None
        info[layer.module_name], stored[layer.module_name] = layer.stored_form(mask, block)
    config.mask_info, config.mask_format = info, VERSION
    size = sum(entry["shape"][0] * entry["shape"][1] for entry in info.values())
    config.sparsity = 1.0 - sum(entry["kept"] for entry in info.values()) / size
    model.peft_config[adapter_name] = config
    model.inject_adapter(model.model, adapter_name)
    for layer in pruning_layers(model, adapter_name):
        layer.set_mask(adapter_name, stored[layer.module_name])
    for module in model.modules():
        if isinstance(module, ModulesToSaveWrapper) and adapters[0] in module.modules_to_save:
            source = module.modules_to_save[adapters[0]].state_dict()
            module.modules_to_save[adapter_name].load_state_dict(source)


def _check_combination(
    model: Any, adapters: list[str], weights: Optional[list[float]], adapter_name: str, combination_type: str
) -> list[float]:
    if combination_type not in COMBINATIONS:
        raise ValueError(
            f"combination_type={combination_type!r} is unknown. Use one of {', '.join(map(repr, COMBINATIONS))}."
        )
    if adapter_name in model.peft_config:
        raise ValueError(f"adapter_name={adapter_name!r} exists already. Choose another name.")
    if len(adapters) < 2:
        raise ValueError(f"adapters={adapters!r}: give two at least.")
    votes = [1.0] * len(adapters) if weights is None else weights
    if len(votes) != len(adapters) or not min(votes) >= 0 or not sum(votes) > 0:
        raise ValueError(f"weights={weights!r} must be {len(adapters)} numbers that are not negative, and not all 0.")
    for name in adapters:
        if name not in model.peft_config:
            raise ValueError(f"adapters: {name!r} is not loaded. Loaded are {sorted(model.peft_config)}.")
        if not cast(PruningConfig, model.peft_config[name]).finalized:
            raise ValueError(f"adapters: the masks of {name!r} are not final. Call peft_prune.finalize first.")
        if cast(PruningConfig, model.peft_config[name]).updates_weights:
            raise ValueError(f"adapters: {name!r} has weights of its own, which cannot be combined as masks are.")
        if pruning_layers(model, name) != pruning_layers(model, adapters[0]):
            raise ValueError(f"adapters: {name!r} and {adapters[0]!r} prune different modules.")
    return votes
