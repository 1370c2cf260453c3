"""The calibration walk: batches go through a model, and observers take notes of what comes into its layers.

Without `after_block` one forward pass shows all layers. With it, one block follows after the other: `after_block` is
called when a block's inputs have been seen, may change the block's masks, and the next block sees what the changed one
puts out. Only one block's notes are in memory at a time.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Optional

import torch
from torch import nn
from transformers.utils.logging import tqdm  # which Transformers' disable_progress_bar() switches off

from .batches import decoder_tokens, model_inputs, real_tokens
from .observers import Counts, Observer


Watched = Mapping[str, tuple[nn.Module, bool]]  # by name: a layer, and whether it sees the decoder's tokens
AfterBlock = Callable[[list[str]], None]

_BLOCK = re.compile(r"(?P<stack>.*?)\.(?P<number>\d+)\..+")


class _Stop(Exception):
    """Ends a forward pass whose rest is not needed."""


def walk(
    model: nn.Module,
    watched: Watched,
    batches: Iterable[Any],
    observer: Observer,
    num_samples: int,
    after_block: Optional[AfterBlock] = None,
    device: Optional[torch.device | str] = None,
) -> None:
    """Show observers what comes into layers, see above. The model runs in eval mode, and is left as it was.

    Args:
        model (`nn.Module`): the model.
        watched: layers by their name in the model.
        batches (`Iterable`): mappings of tensors by name of the model's arguments; labels are not needed.
        observer ([`Observer`]): what takes notes.
        num_samples (`int`): examples after which to stop.
        after_block (`Callable`, *optional*): called with the names of the layers that were seen.
        device (*optional*): where blocks are run, one at a time, by default where the model is.

    Raises:
        ValueError: there are no batches, they are no mappings, or nothing but padding.
    """
    with _quiet(model), torch.no_grad():
        if after_block is None:
            _in_one_pass(model, watched, batches, observer, num_samples)
            return
        taken = list(_taken(model, batches, num_samples, torch.device("cpu")))
        _block_by_block(model, watched, taken, observer, after_block, device)


def _taken(
    model: nn.Module, batches: Iterable[Any], num_samples: int, device: torch.device
) -> Iterator[tuple[dict[str, torch.Tensor], Counts]]:
    """Inputs and real tokens of batches, until there were enough examples."""
    seen = 0
    for batch in batches:
        inputs = model_inputs(model, batch, device)
        yield inputs, (real_tokens(model, inputs), decoder_tokens(model, inputs))
        seen += len(next(iter(inputs.values())))
        if seen >= num_samples:
            return
    if not seen:
        raise ValueError("calibrate: batches is empty. Give it a few hundred examples of the task.")


def _device(model: nn.Module) -> torch.device:
    return next(model.parameters()).device


@contextmanager
def _quiet(model: nn.Module) -> Iterator[None]:
    training = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, mode in training.items():
            module.training = mode


@contextmanager
def _watching(watched: Watched, observer: Observer) -> Iterator[None]:
    def note(key: str, decoder: bool) -> Any:
        return lambda module, args: observer.see(key, decoder, args[0])

    handles = [module.register_forward_pre_hook(note(key, dec)) for key, (module, dec) in watched.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


# --------------------------------------------------------------------- one pass


def _in_one_pass(
    model: nn.Module, watched: Watched, batches: Iterable[Any], observer: Observer, num_samples: int
) -> None:
    with _watching(watched, observer), tqdm(desc="calibrate: run the model", unit="example") as bar:
        bar.total = num_samples
        for inputs, counts in _taken(model, batches, num_samples, _device(model)):
            observer.start(counts)
            model(**inputs)
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


@dataclass
class _Stack:
    """Numbered blocks that follow each other, and the watched layers inside each."""

    path: str
    blocks: dict[int, nn.Module] = field(default_factory=dict)
    layers: dict[int, list[str]] = field(default_factory=dict)


def find_stacks(model: nn.Module, names: Iterable[str]) -> tuple[list[_Stack], list[str]]:
    """Stacks of blocks that hold the named layers, in the order of the model, and the layers outside of all."""
    stacks: dict[str, _Stack] = {}
    outside = []
    for name in names:
        match = _BLOCK.fullmatch(name)
        if match is None:
            outside.append(name)
            continue
        stack = stacks.setdefault(match["stack"], _Stack(match["stack"]))
        stack.layers.setdefault(int(match["number"]), []).append(name)
    for stack in stacks.values():
        children = model.get_submodule(stack.path).named_children()
        stack.blocks = {int(key): block for key, block in children if key.isdigit()}
    order = [path for path, _ in model.named_modules()]
    return sorted(stacks.values(), key=lambda stack: order.index(stack.path)), outside


@dataclass
class _Call:
    """A call of a block: its other arguments; the hidden states are handed from block to block."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]


def _block_by_block(
    model: nn.Module,
    watched: Watched,
    taken: list[tuple[dict[str, torch.Tensor], Counts]],
    observer: Observer,
    after_block: AfterBlock,
    device: Optional[torch.device | str],
) -> None:
    stacks, outside = find_stacks(model, watched)
    with tqdm(total=sum(len(stack.layers) for stack in stacks), desc="calibrate: blocks", unit="block") as bar:
        for stack in stacks:
            _one_stack(model, stack, watched, taken, observer, after_block, device, bar)
    if outside:
        _whole_model(model, {key: watched[key] for key in outside}, taken, observer)
        after_block(outside)


def _one_stack(
    model: nn.Module,
    stack: _Stack,
    watched: Watched,
    taken: list[tuple[dict[str, torch.Tensor], Counts]],
    observer: Observer,
    after_block: AfterBlock,
    device: Optional[torch.device | str],
    bar: Any,
) -> None:
    """The blocks of a stack; those before the first and after the last one of interest are not walked."""
    home = _device(model)
    last = max(stack.layers)
    numbers = [number for number in sorted(stack.blocks) if number <= last]
    hidden, calls = _capture(model, [stack.blocks[n] for n in numbers], [inputs for inputs, _ in taken])
    for i, number in enumerate(numbers):
        block, names = stack.blocks[number], stack.layers.get(number, [])
        block.to(device or home)
        if names:
            with _watching({key: watched[key] for key in names}, observer):
                for (_, counts), states, call in zip(taken, hidden, calls[i], strict=True):
                    observer.start(counts)
                    _run(block, states, call, device or home)
            after_block(names)
            bar.update()
        if number != last:
            hidden = [_run(block, states, call, device or home) for states, call in zip(hidden, calls[i], strict=True)]
        block.to(home)


def _run(block: nn.Module, hidden: torch.Tensor, call: _Call, device: Any) -> torch.Tensor:
    """Hidden states after a block, on the CPU."""
    output = block(*_to((hidden, *call.args), device), **_to(call.kwargs, device))
    return (output[0] if isinstance(output, tuple) else output).cpu()


def _to(value: Any, device: Any) -> Any:
    """A value with its tensors on a device."""
    if isinstance(value, torch.Tensor):
        return value.to(device)
    if isinstance(value, dict):
        return {key: _to(entry, device) for key, entry in value.items()}
    return type(value)(_to(entry, device) for entry in value) if type(value) in (tuple, list) else value


def _capture(
    model: nn.Module, blocks: list[nn.Module], batches: list[dict[str, torch.Tensor]]
) -> tuple[list[torch.Tensor], list[list[_Call]]]:
    """Hidden states that come into the first block, and the other arguments of each block, for each batch.

    Raises:
        ValueError: a block does not take what the one before it puts out, or it is not the only thing between them.
    """
    hidden: list[torch.Tensor] = []
    calls: list[list[_Call]] = [[] for _ in blocks]
    put_out: list[Any] = [None] * len(blocks)

    def before(i: int) -> Any:
        def note(module: nn.Module, args: tuple, kwargs: dict) -> None:
            states, call = _split(args, kwargs)
            if i and put_out[i - 1] is not states:
                raise ValueError(
                    f"calibrate: {type(module).__name__} does not take what the block before it puts out, so blocks "
                    "cannot be walked one by one in this model."
                )
            calls[i].append(call)
            if not i:
                hidden.append(states.cpu())
            if i == len(blocks) - 1:
                raise _Stop

        return note

    def after(i: int) -> Any:
        def note(module: nn.Module, args: tuple, output: Any) -> None:
            put_out[i] = output[0] if isinstance(output, tuple) else output

        return note

    handles: list[Any] = [b.register_forward_pre_hook(before(i), with_kwargs=True) for i, b in enumerate(blocks)]
    handles += [b.register_forward_hook(after(i)) for i, b in enumerate(blocks)]
    try:
        for inputs in batches:
            try:
                model(**_to(inputs, _device(model)) | _without_cache(model))
            except _Stop:
                pass
    finally:
        for handle in handles:
            handle.remove()
    return hidden, calls


def _split(args: tuple, kwargs: dict) -> tuple[torch.Tensor, _Call]:
    """Hidden states and the rest of a block's arguments."""
    if args:
        return args[0], _Call(args[1:], kwargs)
    rest = dict(kwargs)
    return rest.pop("hidden_states"), _Call((), rest)


def _without_cache(model: nn.Module) -> dict[str, Any]:
    """Keys and values are not to be remembered from one run of a block to the next."""
    config = getattr(model, "config", None)
    return {"use_cache": False} if getattr(config, "use_cache", False) else {}


def _whole_model(
    model: nn.Module, watched: Watched, taken: list[tuple[dict[str, torch.Tensor], Counts]], observer: Observer
) -> None:
    with _watching(watched, observer):
        for inputs, counts in taken:
            observer.start(counts)
            model(**_to(inputs, _device(model)))
