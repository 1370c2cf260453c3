"""Names of modules against regular expressions that may come from a stranger's file: bounded in time."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import Any

import regex

from .peft_api import BaseTuner


SECONDS = 1.0  # for one name; the slowest honest pattern takes microseconds


def matches(field: str, pattern: str, name: str) -> bool:
    """Whether a regular expression matches the whole name of a module.

    Args:
        field (`str`): field of the config that the pattern is from, for the error.
        pattern (`str`): the regular expression.
        name (`str`): name of the module.

    Raises:
        ValueError: the pattern is no regular expression, or takes longer than a second.
    """
    try:
        return regex.fullmatch(pattern, name, timeout=SECONDS) is not None
    except TimeoutError as error:
        raise ValueError(
            f"{field}={pattern!r:.200}: matching {name!r} takes more than {SECONDS:g} s. Repeats inside repeats such "
            "as '(a+)+' do that. Give a list of names instead."
        ) from error
    except (regex.error, RecursionError, MemoryError, OverflowError) as error:
        raise ValueError(f"{field}={pattern!r:.200} is not a regular expression ({error}).") from error


def is_target(config: Any, name: str, field: str = "target_modules") -> bool:
    """Whether a config names a module, as PEFT decides it, but with patterns that cannot hang.

    Args:
        config ([`PruningConfig`]): the configuration.
        name (`str`): name of the module.
        field (`str`): `"target_modules"`, or another field that is read in its place.
    """
    targets, excluded = getattr(config, field), config.exclude_modules
    if field == "target_modules" and not isinstance(targets, str) and not isinstance(excluded, str):
        return BaseTuner._check_target_module_exists(config, name)  # type: ignore[return-value]
    bounded = copy.copy(config)
    bounded.target_modules = targets
    if isinstance(excluded, str):
        # PEFT takes names in full where it finds a list
        bounded.exclude_modules = {name} if excluded and matches("exclude_modules", excluded, name) else None
    if isinstance(targets, str):
        bounded.target_modules = {name} if matches(field, targets, name) else set()
    return BaseTuner._check_target_module_exists(bounded, name)  # type: ignore[return-value]


def pattern_of(patterns: Iterable[str], name: str) -> str:
    """The first key of `sparsity_pattern` that matches the end of a module's name, as PEFT's `get_pattern_key`."""
    return next((key for key in patterns if matches("sparsity_pattern", rf"(.*\.)?({key})", name)), name)
