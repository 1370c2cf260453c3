"""Calls of blocks: what is hidden states in them, and blocks that are passed over for a while."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Optional

import torch
from torch import nn


@dataclass
class Call:
    """A call of a block: its other arguments; the hidden states are handed from block to block."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]


def split_arguments(args: tuple, kwargs: dict) -> tuple[torch.Tensor, Call]:
    """Hidden states and the rest of a block's arguments."""
    if args:
        return args[0], Call(args[1:], kwargs)
    rest = dict(kwargs)
    return rest.pop("hidden_states"), Call((), rest)


def hidden_states(output: Any) -> Any:
    """Hidden states in the output of a block."""
    return output[0] if isinstance(output, tuple) else output


def without_states(output: Any) -> Any:
    """The output of a block, without its hidden states."""
    return (None, *output[1:]) if isinstance(output, tuple) else None


@contextmanager
def replaced_forwards(forwards: Mapping[nn.Module, Callable[..., Any]]) -> Iterator[None]:
    """Let modules compute something else while the context lasts."""
    before = {module: vars(module).get("forward") for module in forwards}  # Accelerate, for one, puts another one there
    try:
        for module, forward in forwards.items():
            module.forward = forward
        yield
    finally:
        for module, own in before.items():
            if own is not None:
                module.forward = own
            elif "forward" in vars(module):
                del module.forward


def passing_on(output: Any, change: Optional[Callable[[torch.Tensor], torch.Tensor]] = None) -> Callable[..., Any]:
    """A forward pass that returns the hidden states that come in.

    Args:
        output: an output of the block, whose form is that of the new ones.
        change (`Callable`, *optional*): what is done to the hidden states.
    """

    def forward(*args: Any, **kwargs: Any) -> Any:
        states, _ = split_arguments(args, kwargs)
        states = states if change is None else change(states)
        return (states, *output[1:]) if isinstance(output, tuple) else states

    return forward
