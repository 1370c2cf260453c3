"""The calibration walk: batches go through a model, and observers take notes of what comes into its layers.

Without `after_block` one forward pass shows all layers. With it, one block follows after the other: `after_block` is
called when a block's inputs have been seen, may change the block's masks, and the next block sees what the changed one
puts out. Only one block's notes are in memory at a time. A block is run twice: until its layers' inputs have been seen,
and once it is pruned. Nothing behind the last layer of interest is run, such as a language model's head.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Optional

import torch
from torch import nn
from transformers.utils.logging import tqdm  # which Transformers' disable_progress_bar() switches off

from .batches import decoder_tokens, model_inputs, real_tokens
from .calls import Call, hidden_states
from .capture import Repeated, Stop, capture, to_device
from .checks import check_counts, warn_of_few_examples
from .observers import Counts, Observer
from .place import device_of, moved
from .replay import Feeders, Replay
from .stacks import Stack, find_stacks


Watched = Mapping[str, tuple[nn.Module, bool]]  # by name: a layer, and whether it sees the decoder's tokens
AfterBlock = Callable[[list[str]], Optional[float]]
AroundBlock = Callable[[list[str]], AbstractContextManager[Any]]


@dataclass(frozen=True)
class Manner:
    """How blocks are walked.

    Attributes:
        in_turn (`bool`): whether each layer of a block is seen by itself, in the order of the model, and behind those
            before it that `after_block` has changed.
        feeders (`Mapping`): with `in_turn`, what need not be run again behind a layer that was seen, see [`Replay`].
        changes (`bool`): whether `after_block` changes anything; otherwise each block is run once.
        around_block (`Callable`): gives a context in which the block that holds the named layers is run.
    """

    in_turn: bool = False
    feeders: Feeders = field(default_factory=dict)
    changes: bool = True
    around_block: AroundBlock = lambda names: nullcontext()

    def parts(self, names: list[str]) -> list[list[str]]:
        """Layers that are seen together."""
        return [[name] for name in names] if self.in_turn else [names]


AS_IS = Manner()


def walk(
    model: nn.Module,
    watched: Watched,
    batches: Iterable[Any],
    observer: Observer,
    num_samples: int,
    after_block: Optional[AfterBlock] = None,
    device: Optional[torch.device | str] = None,
    manner: Manner = AS_IS,
) -> None:
    """Show observers what comes into layers, see above. The model runs in eval mode, and is left as it was.

    Args:
        model (`nn.Module`): the model.
        watched: layers by their name in the model.
        batches (`Iterable`): mappings of tensors by name of the model's arguments; labels are not needed.
        observer ([`Observer`]): what takes notes.
        num_samples (`int`): examples after which to stop.
        after_block (`Callable`, *optional*):
            called with the names of the layers that were seen; may return a loss for the progress bar.
        device (*optional*): where blocks are run, one at a time, by default where they are.
        manner ([`Manner`]): how blocks are walked.

    Raises:
        ValueError: there are no batches, they are no mappings, do not fit the model, or hold nothing but padding.
    """
    with quiet(model), torch.no_grad():
        if after_block is None:
            _in_one_pass(model, watched, batches, observer, num_samples)
            return
        taken = list(taken_batches(model, batches, num_samples, torch.device("cpu")))
        check_counts([counts for _, counts in taken])
        warn_of_few_examples(sum(len(next(iter(inputs.values()))) for inputs, _ in taken), num_samples)
        _block_by_block(model, watched, taken, observer, after_block, device, manner)


def taken_batches(
    model: nn.Module, batches: Iterable[Any], num_samples: int, device: torch.device
) -> Iterator[tuple[dict[str, torch.Tensor], Counts]]:
    """Inputs and real tokens of batches, until there were enough examples."""
    seen = 0
    for batch in batches:
        inputs = model_inputs(model, batch, device)
        examples = len(next(iter(inputs.values())))
        if not examples:
            continue
        yield inputs, (real_tokens(model, inputs), decoder_tokens(model, inputs))
        seen += examples
        if seen >= num_samples:
            return
    if not seen:
        raise ValueError(
            "calibrate: batches is empty, or a generator that is exhausted. Pass a few hundred examples of the task."
        )


@contextmanager
def quiet(model: nn.Module) -> Iterator[None]:
    """The model in eval mode while the context lasts; then all is as it was."""
    training = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, mode in training.items():
            module.training = mode


class _Watch:
    """Has an observer see the inputs of some layers, in passes that end when there is nothing left to see.

    A pass runs to its end unless each layer was called once in the first one: what is dynamic may call some again.

    Args:
        watched: layers by name.
        observer ([`Observer`]): what sees them.
        to_end (`bool`): whether passes run to their end in any case.
    """

    def __init__(self, watched: Watched, observer: Observer, to_end: bool = False) -> None:
        self.watched, self.observer, self.to_end = watched, observer, to_end
        self._calls: Counter[str] = Counter()
        self._first, self._stops = True, False

    def __enter__(self) -> _Watch:
        self._handles: list[Any] = []
        for key, (layer, decoder) in self.watched.items():
            self._handles.append(layer.register_forward_pre_hook(self._note(key, decoder)))
        return self

    def __exit__(self, *error: Any) -> None:
        for handle in self._handles:
            handle.remove()

    def run(self, counts: Counts, forward: Callable[[], Any]) -> Any:
        """One forward pass, of a batch with these real tokens; what it returns, if it ends."""
        self._calls.clear()
        self.observer.start(counts)
        output = None
        try:
            output = forward()
        except Stop:
            pass
        if self._first and not self.to_end:
            self._first, self._stops = False, all(self._calls[key] == 1 for key in self.watched)
        return output

    def _note(self, key: str, decoder: bool) -> Any:
        def note(module: nn.Module, args: tuple) -> None:
            self.observer.see(key, decoder, args[0])
            self._calls[key] += 1
            if self._stops and len(self._calls) == len(self.watched):
                raise Stop

        return note


# --------------------------------------------------------------------- one pass


def _in_one_pass(
    model: nn.Module, watched: Watched, batches: Iterable[Any], observer: Observer, num_samples: int
) -> None:
    with _Watch(watched, observer) as watch, tqdm(desc="calibrate: run the model", unit="example") as bar:
        bar.total = num_samples
        for inputs, counts in taken_batches(model, batches, num_samples, device_of(model)):
            watch.run(counts, partial(model, **inputs))
            examples = len(next(iter(inputs.values())))
            if not bar.n:
                bar.total = _examples_ahead(batches, examples, num_samples)
            bar.update(examples)


def _examples_ahead(batches: Iterable[Any], batch_size: int, most: int) -> int:
    """Examples that the progress bar counts to; a last batch may be smaller."""
    try:
        return min(most, len(batches) * batch_size)  # type: ignore[arg-type]
    except TypeError:  # a stream
        return most


# --------------------------------------------------------------- block by block


def _block_by_block(
    model: nn.Module,
    watched: Watched,
    taken: list[tuple[dict[str, torch.Tensor], Counts]],
    observer: Observer,
    after_block: AfterBlock,
    device: Optional[torch.device | str],
    manner: Manner,
) -> None:
    stacks, outside = find_stacks(model, watched)
    with tqdm(total=sum(len(stack.layers) for stack in stacks), desc="calibrate: blocks", unit="block") as bar:
        for stack in stacks:
            try:
                _one_stack(model, stack, watched, taken, observer, after_block, device, manner, bar)
            except Repeated:  # as ALBERT's: seen in passes through the whole model
                outside += [name for names in stack.layers.values() for name in names]
                bar.total -= len(stack.layers)
    for part in manner.parts(outside) if outside else ():
        with manner.around_block(part):
            _whole_model(model, {key: watched[key] for key in part}, taken, observer, not manner.changes)
        after_block(part)


def _one_stack(
    model: nn.Module,
    stack: Stack,
    watched: Watched,
    taken: list[tuple[dict[str, torch.Tensor], Counts]],
    observer: Observer,
    after_block: AfterBlock,
    device: Optional[torch.device | str],
    manner: Manner,
    bar: Any,
) -> None:
    """The blocks of a stack; those behind the last one of interest are not walked."""
    last = max(stack.layers)
    numbers = [number for number in sorted(stack.blocks) if number <= last]
    hidden, calls = capture(model, [stack.blocks[n] for n in numbers], [inputs for inputs, _ in taken])
    for i, number in enumerate(numbers):
        block, names = stack.blocks[number], stack.layers.get(number, [])
        with moved(block, device) as place, manner.around_block(names):
            replay = Replay({key: watched[key][0] for key in names}, manner.feeders)
            for part in manner.parts(names) if names else ():
                with _Watch({key: watched[key] for key in part}, observer, to_end=not manner.changes) as watch:
                    for j, ((_, counts), call) in enumerate(zip(taken, calls[i], strict=True)):
                        with replay.run(j, part):
                            output = watch.run(counts, partial(_run, block, hidden[j], call, place))
                        hidden[j] = hidden[j] if manner.changes else output
                loss = after_block(part)
                if loss is not None:
                    bar.set_postfix({"loss": f"{loss:.2g}"}, refresh=False)
            bar.update(bool(names))
            if number != last and (manner.changes or not names):
                for j, call in enumerate(calls[i]):
                    with replay.run(j):
                        hidden[j] = _run(block, hidden[j], call, place)  # one by one, so that nothing is held twice


def _run(block: nn.Module, hidden: torch.Tensor, call: Call, device: Any) -> torch.Tensor:
    """Hidden states after a block, on the CPU."""
    # a copy, because it is needed again: a block may change its input in place
    output = block(hidden.to(device, copy=True), *to_device(call.args, device), **to_device(call.kwargs, device))
    return hidden_states(output).cpu()


def _whole_model(
    model: nn.Module,
    watched: Watched,
    taken: list[tuple[dict[str, torch.Tensor], Counts]],
    observer: Observer,
    to_end: bool,
) -> None:
    with _Watch(watched, observer, to_end) as watch:
        for inputs, counts in taken:
            watch.run(counts, partial(model, **to_device(inputs, device_of(model))))
