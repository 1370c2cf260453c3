"""Presets: what the fields of a config hold that were left out."""

from __future__ import annotations

from collections.abc import Mapping
from copy import copy
from dataclasses import field
from typing import Any

from .config_checks import check_choice


def by_preset(what: str) -> Any:
    """A field that is `None` until a preset fills it in; `what` is its help."""
    return field(default=None, metadata={"help": f"{what} By default as `preset` says."})


def check_preset(config: Any, presets: Mapping[str, Any]) -> None:
    """Raise `ValueError` if `config.preset` is neither `"auto"` nor one of some presets."""
    check_choice("preset", config.preset, ("auto", *presets))


def fill_in(config: Any, values: Mapping[str, Any]) -> None:
    """Give each field that is still `None` its value, a copy of its own."""
    for name, value in values.items():
        if getattr(config, name) is None:
            setattr(config, name, copy(value))
