"""What the fields of a [`PruningConfig`] may be; errors name field, value and fix."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from .masks.allocation import ALLOCATIONS
from .masks.codec import READABLE, is_mask_info
from .masks.importance import SCORE_INITS
from .masks.schedule import CURVES


def plain(value: Any) -> Any:
    """A value without NumPy in it, inside lists, tuples, sets and dicts too: what JSON can write."""
    if isinstance(value, (np.generic, np.ndarray)):
        return value.tolist()
    if type(value) is dict:
        return {plain(key): plain(entry) for key, entry in value.items()}
    if type(value) in (list, tuple, set):
        return type(value)(plain(entry) for entry in value)
    return value


def check_number(name: str, value: Any, low: float, high: float, fix: str, open_high: bool = False) -> None:
    """Raise `ValueError` if a field is no number between two limits; `fix` is the end of the message."""
    bad = isinstance(value, bool) or not isinstance(value, (int, float))
    if bad or not low <= value <= high or (open_high and value == high):
        end = ")" if open_high else "]"
        raise ValueError(f"{name}={value!r} must be a number in [{low:g}, {high:g}{end}. {fix}")


def check_flag(name: str, value: Any) -> None:
    """Raise `ValueError` if a field is neither `True` nor `False`: a text such as "no" would count as `True`."""
    if not isinstance(value, bool):
        raise ValueError(f"{name}={value!r} must be True or False.")


def check_whole(name: str, value: Any, least: int) -> None:
    """Raise `ValueError` if a field is no whole number, or less than the least one."""
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(f"{name}={value!r} must be a whole number, at least {least}.")


def check_choice(name: str, value: Any, choices: Sequence[str]) -> None:
    """Raise `ValueError` if a field is none of the choices."""
    if value not in choices:
        raise ValueError(f"{name}={value!r} is unknown. Use one of {', '.join(map(repr, choices))}.")


def check_targets(config: Any) -> None:
    """Which modules."""
    if config.target_parameters:
        raise ValueError(
            f"target_parameters={config.target_parameters!r} cannot be pruned: masks are put on modules, and these "
            "are parameters of a module that does more than multiply by them (experts of a mixture, for instance). "
            "Use target_modules to prune the other layers."
        )
    if config.layers_pattern and config.layers_to_transform is None:
        raise ValueError(
            f"layers_pattern={config.layers_pattern!r} has no effect without `layers_to_transform`. Give both."
        )
    for name in ("layers_to_transform", "layers_pattern"):
        if getattr(config, name) is not None and isinstance(config.target_modules, str):
            raise ValueError(
                f"{name}={getattr(config, name)!r} cannot be combined with target_modules as a string "
                f"({config.target_modules!r}). Put the layers into the regular expression, or give a list."
            )


def check_allocation(config: Any) -> None:
    """How the density is shared out."""
    check_choice("allocation", config.allocation, ALLOCATIONS)
    if (
        isinstance(config.granularity, str)
        and ":" in config.granularity
        and (config.allocation != "local" or config.sparsity_pattern)
    ):
        raise ValueError(
            f"granularity={config.granularity!r} fixes the density of every matrix, so allocation="
            f"{config.allocation!r} and sparsity_pattern={config.sparsity_pattern!r} must stay at their defaults."
        )
    if config.allocation_temperature is not None:
        check_number("allocation_temperature", config.allocation_temperature, 1e-6, 1e6, "Try 1.")


def check_schedule(config: Any) -> None:
    """How sparsity grows."""
    check_choice("sparsity_schedule", config.sparsity_schedule, tuple(CURVES))
    check_choice("penalty_schedule", config.penalty_schedule, tuple(CURVES))
    # of a final adapter, `sparsity` is what was reached
    highest = 1.0 if config.finalized else float(config.sparsity or 0)
    check_number("initial_sparsity", config.initial_sparsity, 0.0, highest, "It cannot exceed `sparsity`.")
    check_number("schedule_start", config.schedule_start, 0.0, 1.0, "It is a share of training.", open_high=True)
    check_number("schedule_end", config.schedule_end, 0.0, 1.0, "It is a share of training.")
    if config.schedule_end <= config.schedule_start:
        raise ValueError(
            f"schedule_end={config.schedule_end!r} must come after schedule_start={config.schedule_start!r}; for a "
            "sudden change use sparsity_schedule='constant'."
        )
    if config.total_steps is not None:
        check_whole("total_steps", config.total_steps, 1)


def check_training(config: Any) -> None:
    """Scores, penalty, masks."""
    check_flag("init_weights", config.init_weights)
    if isinstance(config.score_init, bool) or not isinstance(config.score_init, (int, float)):
        check_choice("score_init", config.score_init, SCORE_INITS)
    else:
        check_number("score_init", config.score_init, -1e6, 1e6, "The papers use 0.")
    check_number("penalty", config.penalty, 0.0, 1e9, "Use 0 for no penalty.")
    check_number("score_lr", config.score_lr, 0.0, 1e3, "The paper uses 2e-2.")
    for name in ("score_rank", "mask_interval"):
        check_whole(name, getattr(config, name), 1)
    if config.score == "low_rank" and config.score_init == "random":
        raise ValueError(
            "score_init='random' cannot be combined with score='low_rank', which computes where scores start each "
            "time anew. Use 'magnitude', 'zeros' or a number."
        )


def check_stored_form(config: Any) -> None:
    """What a file says of its masks."""
    check_flag("finalized", config.finalized)
    check_flag("check_base", config.check_base)
    if config.mask_format not in READABLE:
        raise ValueError(
            f"mask_format={config.mask_format!r} is not known to this version of peft_prune, which reads "
            f"{' and '.join(map(str, READABLE))}. "
            "Upgrade it: `pip install -U peft_prune`."
        )
    if config.finalized and not config.mask_info:
        raise ValueError("finalized=True without `mask_info`: the adapter's config is incomplete. Save it again.")
    for name, info in (config.mask_info or {}).items():
        if not is_mask_info(info):
            raise ValueError(
                f"mask_info[{name!r}]={info!r} must be a dict of shape (two positive numbers), kept (at most as "
                "many weights), bytes (no more than the packed mask) and crc32 (text): the adapter's config is "
                "damaged. Download or save it again."
            )
