"""A model that is run without some of its blocks, on a few examples."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any, Optional

import torch
from torch import nn

from .calls import hidden_states, passing_on, replaced_forwards, split_arguments, without_states
from .capture import to_device
from .place import device_of


Taken = Sequence[tuple[dict[str, torch.Tensor], torch.Tensor]]  # inputs; bool, (batch, tokens): no padding


class Shortened:
    """Runs a model without blocks that were removed, and tries what it answers without one more.

    What comes into each block is held, on the device of the model, so that a trial costs the blocks behind alone:
    tokens × width × blocks numbers.

    Args:
        model (`nn.Module`): the model, in eval mode.
        blocks (`Sequence[nn.Module]`): its blocks, in order; the first is never removed.
        adds (`Sequence[Optional[torch.Tensor]]`): what each block adds to a token when it is removed.
        taken: inputs of the model, and which of their tokens are no padding.
    """

    def __init__(
        self, model: nn.Module, blocks: Sequence[nn.Module], adds: Sequence[Optional[torch.Tensor]], taken: Taken
    ) -> None:
        self.model, self.blocks, self.adds, self.taken = model, list(blocks), adds, taken
        self.removed: set[int] = set()
        self._forms: list[Any] = [None] * len(self.blocks)
        self._inputs: list[dict[int, torch.Tensor]] = []

    def answers(self) -> Iterator[Any]:
        """The model's output for each batch, without what was removed."""
        self._inputs = [{} for _ in self.taken]
        for i in range(len(self.taken)):
            with self._noting(i):
                yield self._run(i, {number: self._passing_on(number) for number in self.removed})

    def answers_without(self, number: int) -> Iterator[Any]:
        """The output for each batch if one more block were removed; [`answers`] has to be read to its end before."""
        gone = {other: self._passing_on(other) for other in self.removed | {number}}
        before = {other: passing_on(self._forms[other]) for other in range(1, number)}
        for i, states in enumerate(self._inputs):
            first = {0: passing_on(self._forms[0], partial(_instead, states[number]))}
            yield self._run(i, gone | before | first)

    def _passing_on(self, number: int) -> Callable[..., Any]:
        added = self.adds[number]
        return passing_on(self._forms[number], None if added is None else added.add)

    def _run(self, i: int, forwards: dict[int, Callable[..., Any]]) -> Any:
        inputs = to_device(self.taken[i][0], device_of(self.model))
        if getattr(getattr(self.model, "config", None), "use_cache", False):
            inputs = inputs | {"use_cache": False}
        with replaced_forwards({self.blocks[number]: forward for number, forward in forwards.items()}):
            return self.model(**inputs)

    @contextmanager
    def _noting(self, i: int) -> Iterator[None]:
        """Note what comes into blocks, and the form of what they put out."""

        def note(number: int, module: nn.Module, args: tuple, kwargs: dict, output: Any) -> None:
            self._forms[number] = without_states(output)

        def note_input(number: int, module: nn.Module, args: tuple, kwargs: dict) -> None:
            if number:
                self._inputs[i][number] = split_arguments(args, kwargs)[0].clone()  # a block may change it in place

        with ExitStack() as stack:
            for number, block in enumerate(self.blocks):
                handles: list[Any] = [
                    block.register_forward_pre_hook(partial(note_input, number), with_kwargs=True),
                    block.register_forward_hook(partial(note, number), with_kwargs=True),
                ]
                for handle in handles:
                    stack.callback(handle.remove)
            yield


def _instead(states: torch.Tensor, incoming: torch.Tensor) -> torch.Tensor:
    return states.clone()


def similarity_of_blocks(model: nn.Module, blocks: Sequence[nn.Module], taken: Taken) -> torch.Tensor:
    """Cosine similarity of what comes into each block and what it puts out, mean over tokens: float64, (blocks,)."""
    sums = torch.zeros(len(blocks), dtype=torch.float64)
    for inputs, real in taken:

        def note(number: int, real: torch.Tensor, module: Any, args: tuple, kwargs: dict, output: Any) -> None:
            states, after = split_arguments(args, kwargs)[0].float(), hidden_states(output).float()
            similarity = torch.cosine_similarity(states, after, dim=-1)
            sums[number] += similarity[real.to(states.device)].double().sum().cpu()

        with ExitStack() as stack:
            for number, block in enumerate(blocks):
                handle = block.register_forward_hook(partial(note, number, real), with_kwargs=True)
                stack.callback(handle.remove)
            model(**to_device(inputs, device_of(model)))
    return sums / sum(int(real.sum()) for _, real in taken)
