"""New masks from old ones: union, intersection, majority vote."""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Sequence
from fractions import Fraction
from typing import Any, Optional, cast

import torch

from ..config import PruningConfig
from ..layers.layer import pruning_layers
from ..peft_api import ModulesToSaveWrapper
from ..storage.codec import VERSION


COMBINATIONS = ("union", "intersection", "majority")
_LOW_BITS = (1 << 40) - 1


def combine_masks(masks: Sequence[torch.Tensor], how: str, weights: Sequence[float]) -> torch.Tensor:
    """Combine masks of one matrix.

    Args:
        masks (`Sequence[torch.Tensor]`): bool, the same shape.
        how (`str`): `"union"` keeps what any mask keeps, `"intersection"` what all keep, `"majority"` what more than
            half of the votes keep.
        weights (`Sequence[float]`): votes of each mask, for `"majority"`. They are added exactly, as the decimals that
            they are written as: of 0.2, 0.3 and 0.1, the 0.3 is half, and not more.

    Returns:
        `torch.Tensor`: bool, of that shape.
    """
    if how == "majority":
        return _majority(masks, [_exact(weight) for weight in weights])
    stacked = torch.stack(list(masks))
    return stacked.any(0) if how == "union" else stacked.all(0)


def _exact(weight: Any) -> Fraction:
    """The number that was written: 0.1 is a tenth, and not the float that is nearest to it."""
    try:
        return Fraction(str(weight))
    except ValueError:  # a tensor
        return Fraction(str(float(weight)))


def _majority(masks: Sequence[torch.Tensor], weights: Sequence[Fraction]) -> torch.Tensor:
    """Where votes for outweigh votes against, in whole numbers of any size: 40 bits at a time, the lowest first."""
    scale = math.lcm(*(weight.denominator for weight in weights))
    rest = [int(weight * scale) for weight in weights]
    carry = torch.zeros_like(masks[0], dtype=torch.int64)
    above_zero = torch.zeros_like(masks[0], dtype=torch.bool)
    while any(rest):
        for mask, weight in zip(masks, rest, strict=True):
            part = weight & _LOW_BITS
            carry += torch.where(mask, part, -part)
        above_zero |= (carry & _LOW_BITS) != 0
        carry >>= 40
        rest = [weight >> 40 for weight in rest]
    return (carry > 0) | ((carry == 0) & above_zero)


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
    config.inference_mode = True  # masks are final, and nothing of them is trained
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
        raise ValueError(f"adapters={adapters!r}: give at least two.")
    votes = [1.0] * len(adapters) if weights is None else weights
    finite = all(math.isfinite(vote) and vote >= 0 for vote in votes)
    if len(votes) != len(adapters) or not finite or not sum(votes) > 0:
        raise ValueError(f"weights={weights!r} must be {len(adapters)} non-negative numbers, not all 0.")
    for name in adapters:
        if name not in model.peft_config:
            raise ValueError(f"adapters: {name!r} is not loaded. Loaded are {sorted(model.peft_config)}.")
        if not cast(PruningConfig, model.peft_config[name]).finalized:
            raise ValueError(f"adapters: the masks of {name!r} are not final. Call peft_prune.finalize first.")
        if any(layer.changes_weights(name) for layer in pruning_layers(model, name)):
            raise ValueError(
                f"adapters: {name!r} has weights of its own, which cannot be combined like masks. Activate it alone."
            )
        if pruning_layers(model, name) != pruning_layers(model, adapters[0]):
            raise ValueError(f"adapters: {name!r} and {adapters[0]!r} prune different modules.")
    return votes
