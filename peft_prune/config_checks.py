"""What the fields of a [`PruningConfig`] may be; errors name field, value and fix."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import numpy as np

from .importance.calibrated_start import CALIBRATED_STARTS
from .importance.start import SCORE_INITS
from .selection.allocation import ALLOCATIONS
from .selection.curve import CURVES
from .storage.codec import READABLE, is_mask_info


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


def check_single_weights(granularity: Any) -> None:
    """Raise `ValueError` unless a granularity is `"weight"` or n:m, where weights of a row compete."""
    if granularity != "weight" and not (isinstance(granularity, str) and ":" in granularity):
        raise ValueError(
            f"granularity={granularity!r} is not supported: weights of a row compete here. Use 'weight', or an n:m "
            "pattern such as '2:4'."
        )


def check_names(config: Any) -> None:
    """Names of modules and numbers of layers have to be such: PEFT puts some of them into regular expressions."""
    for name in ("target_modules", "exclude_modules", "prune_target_modules"):
        value = getattr(config, name, None)
        if value is not None and not isinstance(value, str) and not is_names(value):
            raise ValueError(f"{name}={value!r:.200} must be a list of names, or a regular expression as a string.")
        if isinstance(value, str):
            check_pattern(name, value)
    for name in ("modules_to_save", "layers_pattern"):
        value = getattr(config, name)
        names = [value] if isinstance(value, str) and name == "layers_pattern" else value
        if names is not None and not (is_names(names) and all(re.fullmatch(r"[\w.\-/]*", n) for n in names)):
            raise ValueError(f"{name}={value!r:.200} must be a list of names of modules, without special characters.")
    if not isinstance(config.granularity, str):
        raise ValueError(f"granularity={config.granularity!r:.200} must be a string such as 'weight' or '2:4'.")
    layers = config.layers_to_transform
    numbers = [layers] if isinstance(layers, int) else layers
    if numbers is not None and not (
        isinstance(numbers, (list, tuple, set, range)) and all(isinstance(n, int) for n in numbers)
    ):
        raise ValueError(f"layers_to_transform={layers!r:.200} must be a whole number, or a list of them.")


def is_names(value: Any) -> bool:
    """Whether a value is a list or set of strings."""
    return isinstance(value, (list, tuple, set)) and all(isinstance(item, str) for item in value)


def check_pattern(name: str, pattern: Any) -> None:
    """Raise `ValueError` if a field is no regular expression."""
    try:
        re.compile(pattern)
    except (re.error, TypeError, RecursionError, OverflowError) as error:
        raise ValueError(f"{name}: {pattern!r:.200} is not a module name or regular expression ({error}).") from error


def check_sparsity_pattern(pattern: Any, fix: str) -> None:
    """Raise `ValueError` if a field is no dict of sparsities by name or regular expression."""
    if not isinstance(pattern or {}, dict):
        raise ValueError(
            f"sparsity_pattern={pattern!r:.200} must be a dict of sparsities by module name, such as {{'query': 0.5}}."
        )
    for key, value in (pattern or {}).items():
        check_pattern("sparsity_pattern", key)
        check_number(f"sparsity_pattern[{key!r}]", value, 0.0, 1.0, fix, open_high=True)


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
    if config.allocation == "row" and config.granularity in ("row", "column", "head"):
        raise ValueError(
            f"allocation='row' cannot be combined with granularity={config.granularity!r}: it lets weights, or blocks, "
            "of a row compete. Use allocation='local', or granularity='weight' or a block such as '1x16'."
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
        check_choice("score_init", config.score_init, (*SCORE_INITS, *CALIBRATED_STARTS))
    else:
        check_number("score_init", config.score_init, -1e6, 1e6, "The papers use 0.")
    check_number("penalty", config.penalty, 0.0, 1e9, "Use 0 for no penalty.")
    check_number("score_lr", config.score_lr, 0.0, 1e3, "The paper uses 2e-2.")
    check_betas(config.score_betas)
    for name in ("score_rank", "mask_interval", "num_samples"):
        check_whole(name, getattr(config, name), 1)
    if config.score == "low_rank" and config.score_init == "random":
        raise ValueError(
            "score_init='random' cannot be combined with score='low_rank', which recomputes the initial scores each "
            "time. Use 'magnitude', 'zeros' or a number."
        )


def check_betas(value: Any) -> None:
    """Raise `ValueError` if a field is neither `None` nor two numbers in [0, 1)."""
    if value is None:
        return
    if not isinstance(value, (list, tuple)) or len(value) != 2:
        raise ValueError(f"score_betas={value!r:.200} must be two numbers, such as [0.9, 0.99], or None.")
    for number in value:
        check_number("score_betas", number, 0.0, 1.0, "Adam's defaults are [0.9, 0.999].", open_high=True)


def check_stored_form(config: Any) -> None:
    """What a file says of its masks."""
    check_flag("finalized", config.finalized)
    check_flag("check_base", config.check_base)
    check_flag("check_tensors", config.check_tensors)
    if config.mask_info is not None and not isinstance(config.mask_info, dict):
        raise ValueError(
            f"mask_info={config.mask_info!r:.80} must be a dict by module name: the adapter's config is damaged. "
            "Download or save it again."
        )
    if isinstance(config.mask_format, bool) or config.mask_format not in READABLE:
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
                f"mask_info[{name!r}]={info!r:.400} must be a dict of shape (two positive numbers), kept (at most as "
                "many weights), bytes (no more than the packed mask) and crc32 (text): the adapter's config is "
                "damaged. Download or save it again."
            )


def check_verbalizer(spec: Any) -> None:
    """Raise `ValueError` if a field is neither `None` nor what [`make_verbalizer`] returns."""
    if spec is None:
        return
    known = isinstance(spec, dict) and spec.keys() == {"task", "words", "token_ids", "mask_token_id"}
    if not known or spec["task"] not in ("SEQ_CLS", "QUESTION_ANS") or not _are_labels(spec):
        raise ValueError(
            f"verbalizer={spec!r:.200} must be what peft_prune.make_verbalizer returns: task ('SEQ_CLS' or "
            "'QUESTION_ANS'), at least two words, a different token id for each, and mask_token_id."
        )


def _are_labels(spec: dict[str, Any]) -> bool:
    words, ids, mask = spec["words"], spec["token_ids"], spec["mask_token_id"]
    if not isinstance(words, (list, tuple)) or not isinstance(ids, (list, tuple)) or not is_names(words):
        return False
    numbers = [*ids] if mask is None else [*ids, mask]
    if not all(isinstance(n, int) and not isinstance(n, bool) and int(n) >= 0 for n in numbers):
        return False
    return len(ids) == len(words) >= 2 and len(set(ids)) == len(ids)
