"""What comes into the blocks of a stack, with as little of the model run as possible.

The hidden states are needed for the first block only: from there on they are handed from block to block. What else a
block is called with (masks, rotary embeddings) rarely depends on the blocks before it. So one batch goes through all
blocks, and then through stand-ins that return what comes in. If both times every block was called with the same, other
batches go through the stand-ins, which cost nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, Optional

import torch
from torch import nn

from .calls import Call, hidden_states, passing_on, replaced_forwards, split_arguments, without_states


class Stop(Exception):
    """Ends a forward pass whose rest is not needed."""


class Repeated(Exception):
    """A block is called several times in a forward pass, so blocks do not follow each other."""


def to_device(value: Any, device: Any) -> Any:
    """A value with its tensors on a device."""
    return _mapped(value, lambda tensor: tensor.to(device))


def _mapped(value: Any, change: Callable[[torch.Tensor], torch.Tensor]) -> Any:
    if isinstance(value, torch.Tensor):
        return change(value)
    if isinstance(value, dict):
        return {key: _mapped(entry, change) for key, entry in value.items()}
    return type(value)(_mapped(entry, change) for entry in value) if type(value) in (tuple, list) else value


def capture(
    model: nn.Module, blocks: list[nn.Module], batches: list[dict[str, torch.Tensor]]
) -> tuple[list[torch.Tensor], list[list[Call]]]:
    """Hidden states that come into the first block, and the other arguments of each block, for each batch.

    Args:
        model (`nn.Module`): the model.
        blocks (`list[nn.Module]`): blocks that follow each other.
        batches (`list[dict[str, torch.Tensor]]`): arguments of the model.

    Returns:
        `tuple[list[torch.Tensor], list[list[Call]]]`: hidden states of each batch (on the CPU, in the dtype of the
        model); calls of each block. What is equal in several batches, such as rotary embeddings, is held once.

    Raises:
        ValueError: a block does not accept the output of the one before it, or it is not the only thing between them.
        Repeated: a block is called several times in a forward pass.
    """
    held = _Held()
    first = _Recorder(blocks, held, to_the_end=len(blocks) == 1)  # is it called again?
    first.run(model, batches[:1])
    hand_on = len(batches) > 1 and _hands_on(model, blocks, batches[0], first)
    others = _Recorder(blocks, held)
    with _stand_ins(blocks, first.put_out if hand_on else None):
        others.run(model, batches[1:])
    return first.hidden + others.hidden, [a + b for a, b in zip(first.calls, others.calls, strict=True)]


class _Recorder:
    """Notes what blocks are called with, and stops before the last one is run.

    Args:
        blocks (`list[nn.Module]`): the blocks.
        held ([`_Held`]): tensors of other batches.
        to_the_end (`bool`): whether to run the last block, and what is behind it.
    """

    def __init__(self, blocks: list[nn.Module], held: _Held, to_the_end: bool = False) -> None:
        self.blocks, self.held, self.to_the_end = blocks, held, to_the_end
        self.hidden: list[torch.Tensor] = []
        self.calls: list[list[Call]] = [[] for _ in blocks]
        # by each block, in the last batch; without hidden states once they were taken, so that few are held together
        self.put_out: list[Any] = [None] * len(blocks)
        self._batches = 0

    def run(self, model: nn.Module, batches: list[dict[str, torch.Tensor]]) -> None:
        numbered = list(enumerate(self.blocks))
        handles: list[Any] = [b.register_forward_pre_hook(self._before(i), with_kwargs=True) for i, b in numbered]
        handles += [b.register_forward_hook(self._after(i)) for i, b in numbered]
        try:
            for inputs in batches:
                try:
                    model(**to_device(inputs, next(model.parameters()).device) | _without_cache(model))
                except Stop:
                    pass
                self._batches += 1
        finally:
            for handle in handles:
                handle.remove()

    def _before(self, i: int) -> Any:
        def note(module: nn.Module, args: tuple, kwargs: dict) -> None:
            states, call = split_arguments(args, kwargs)
            if i and hidden_states(self.put_out[i - 1]) is not states:
                raise ValueError(
                    f"calibrate: {type(module).__name__} does not accept the output of the block before it, so this "
                    "model cannot be calibrated block by block."
                )
            if len(self.calls[i]) > self._batches:
                raise Repeated
            self.calls[i].append(self.held.once(call))
            if i:
                self.put_out[i - 1] = without_states(self.put_out[i - 1])
            else:
                self.hidden.append(states.to("cpu", copy=True))  # a block may change its input in place
            if i == len(self.blocks) - 1 and not self.to_the_end:
                raise Stop

        return note

    def _after(self, i: int) -> Any:
        def note(module: nn.Module, args: tuple, output: Any) -> None:
            self.put_out[i] = output

        return note


@dataclass
class _Held:
    """Tensors that are equal are held once, whatever the number of batches.

    Args:
        most (`int`): how many of one shape a tensor is compared with.
    """

    most: int = 8
    _known: dict[Any, list[torch.Tensor]] = field(default_factory=dict)

    def once(self, call: Call) -> Call:
        """A call with equal tensors of calls before."""
        return Call(_mapped(call.args, self._tensor), _mapped(call.kwargs, self._tensor))

    def _tensor(self, tensor: torch.Tensor) -> torch.Tensor:
        alike = self._known.setdefault((tensor.shape, tensor.dtype, tensor.device), [])
        for known in alike:
            if known is tensor or torch.equal(known, tensor):
                return known
        if len(alike) < self.most:
            alike.append(tensor)
        return tensor


def _without_cache(model: nn.Module) -> dict[str, Any]:
    """Keys and values are not to be remembered from one run of a block to the next."""
    config = getattr(model, "config", None)
    return {"use_cache": False} if getattr(config, "use_cache", False) else {}


# ------------------------------------------------------------------- stand-ins


def _hands_on(model: nn.Module, blocks: list[nn.Module], batch: dict[str, torch.Tensor], real: _Recorder) -> bool:
    """Whether blocks hand on nothing but hidden states, so that stand-ins show what each is called with."""
    rest = [output[1:] for output in real.put_out[:-1] if isinstance(output, tuple)]
    if any(entry is not None for entries in rest for entry in entries):
        return False  # T5's first block computes the position bias of all
    again = _Recorder(blocks, real.held)
    with _stand_ins(blocks, real.put_out):
        again.run(model, [batch])
    pairs = [pair for one, two in zip(real.calls, again.calls, strict=True) for pair in zip(one, two, strict=True)]
    return all(_same((a.args, a.kwargs), (b.args, b.kwargs)) for a, b in pairs)


def _stand_ins(blocks: list[nn.Module], put_out: Optional[list[Any]]) -> AbstractContextManager[None]:
    """Let blocks return the hidden states that come in, in the form of an output that was seen; `None`: as they are."""
    return replaced_forwards({b: passing_on(o) for b, o in zip(blocks, put_out or [], strict=False)})


def _same(one: Any, other: Any) -> bool:
    """Whether two arguments are alike, tensors by their values. Objects that are no plain ones have to be one."""
    if isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor):
        return one.device == other.device and one.dtype == other.dtype and torch.equal(one, other)
    if type(one) is not type(other):
        return False
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(_same(one[key], other[key]) for key in one)
    if isinstance(one, (tuple, list)):
        return len(one) == len(other) and all(map(_same, one, other))
    return one is other or (isinstance(one, (int, float, str)) and one == other)
