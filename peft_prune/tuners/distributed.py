"""Several processes, one mask: parameters that are split among them (FSDP, ZeRO-3), made whole for a moment.

A mask follows from all scores of a matrix, and no process holds them between two forward passes. What needs them, which
is the schedule, the end of training and the penalty's value, goes through [`gathered`], and the mask that is found
there serves until the schedule moves again.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from itertools import groupby
from typing import Any, Optional

import torch
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn

from .state import AdapterState


def gathered(model: nn.Module, layers: Sequence[Any], frozen: bool = False) -> Iterator[Any]:
    """Yield layers one by one, each with whole parameters of full precision until the next one is asked for.

    Where nothing is sharded the layers are yielded as they are. Otherwise every process has to get here, and masks come
    out the same on all, because all see the same numbers.

    Args:
        model (`nn.Module`): the model that the layers are in, as FSDP or `accelerator.prepare` returned it.
        layers: pruning layers of it.
        frozen (`bool`): whether frozen parameters, the base weights, are needed too.

    Raises:
        ValueError: FSDP wraps something that cannot be pruned, or not be saved, that way.
    """
    if not _several_processes():
        yield from layers
        return
    units = _units(model, layers)
    for _, group in groupby(layers, key=lambda layer: id(units.get(id(layer)))):
        members = list(group)
        with _whole_unit(model, members, units.get(id(members[0]))):
            for layer in members:
                with _whole_layer(layer, frozen):
                    yield layer


@contextmanager
def all_gathered(model: nn.Module, layers: Sequence[Any]) -> Iterator[None]:
    """All layers whole at once, for what compares weights of different ones."""
    if not _several_processes():
        yield
        return
    units = _units(model, layers)
    with ExitStack() as stack:
        for unit in {id(unit): unit for unit in units.values()}.values():
            members = [layer for layer in layers if units.get(id(layer)) is unit]
            stack.enter_context(_whole_unit(model, members, unit))
        for layer in layers:
            stack.enter_context(_whole_layer(layer, True))
        yield


def agreed(choice: Any) -> Any:
    """What the first process chose, in all of them; every process has to get here."""
    if not _several_processes():
        return choice
    choices = [choice]
    torch.distributed.broadcast_object_list(choices)
    return choices[0]


def plain_name(name: str) -> str:
    """A module's name without what FSDP1 and its activation checkpointing put into it; state dicts are without, too."""
    return name.replace("_fsdp_wrapped_module.", "").replace("_checkpoint_wrapped_module.", "")


def refuse_sharded(layers: Sequence[Any], what: str) -> None:
    """Raise `ValueError` if base weights are split among processes, where `what` needs them whole."""
    for layer in layers:
        weight = layer.weight
        if weight.dim() != 2 or hasattr(weight, "ds_id") or hasattr(weight, "full_tensor"):
            raise ValueError(
                f"{what}: the weight of {layer.module_name!r} is split among processes (FSDP or ZeRO-3). Call it "
                "before the model is prepared for training, or on one that is loaded in one process."
            )


def _several_processes() -> bool:
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def _units(model: nn.Module, layers: Sequence[Any]) -> dict[int, nn.Module]:
    """FSDP's unit of each layer, the innermost FSDP module around it, by the layer's identity."""
    from torch.distributed.fsdp import FullyShardedDataParallel

    _check_wrapping(model, layers)
    owners: dict[int, nn.Module] = {}
    for unit in model.modules():  # outer ones come first
        if isinstance(unit, FullyShardedDataParallel):
            owners |= {id(part): unit for part in unit.modules()}
    return {id(layer): owners[id(layer)] for layer in layers if id(layer) in owners}


def _check_wrapping(model: nn.Module, layers: Sequence[Any]) -> None:
    from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel

    for layer in layers:
        for name, part in layer.named_modules():
            if part is not layer and isinstance(part, (FSDPModule, FullyShardedDataParallel)):
                raise ValueError(
                    f"FSDP wraps {name!r} inside the pruned layer {layer.module_name!r} as a unit of its own, so "
                    "weight and scores are never whole together. Wrap whole blocks: "
                    "fsdp_config={'transformer_layer_cls_to_wrap': ['BertLayer']}, or your model's class of blocks."
                )
    for name, wrapper in model.named_modules():
        if isinstance(wrapper, AuxiliaryTrainingWrapper):
            if any(isinstance(part, FullyShardedDataParallel) for part in wrapper.modules()):
                raise ValueError(
                    f"{name!r} is trained in full beside the adapter (modules_to_save) and wrapped by FSDP version 1, "
                    "from which PEFT cannot save it: one process would wait for the others forever. Use FSDP version "
                    "2, fsdp_config={'version': 2}, or train no such module."
                )


@contextmanager
def _whole_unit(model: nn.Module, layers: list[Any], unit: Optional[nn.Module]) -> Iterator[None]:
    """Parameters of a unit of FSDP1."""
    if unit is None:
        yield
        return
    from torch.distributed.fsdp import FullyShardedDataParallel as FSDP

    for layer in layers:
        _note_shards(layer)
    root = next(part for part in model.modules() if isinstance(part, FSDP))
    # whichever unit is looked at first would take itself for the root
    first = FSDP.summon_full_params(root, recurse=False, writeback=False) if root is not unit else nullcontext()
    with first:
        pass
    with FSDP.summon_full_params(unit, recurse=False, writeback=False), _marked_whole(layers):
        yield


@contextmanager
def _whole_layer(layer: Any, frozen: bool) -> Iterator[None]:
    """Parameters of a layer under FSDP2 or ZeRO-3."""
    from torch.distributed.tensor import DTensor

    places = [(module, key, p) for module in layer.modules() for key, p in module._parameters.items() if p is not None]
    wanted = [place for place in places if frozen or place[2].requires_grad]
    split = [place for place in wanted if isinstance(place[2], DTensor)]
    partitioned = [p for _, _, p in wanted if hasattr(p, "ds_id")]
    if not split and not partitioned:
        yield
        return
    _note_shards(layer)
    with _zero3(partitioned), _marked_whole([layer]):
        try:
            for module, key, p in split:
                module._parameters[key] = nn.Parameter(p.full_tensor().detach(), p.requires_grad)  # type: ignore[attr-defined]
            yield
        finally:
            for module, key, p in split:
                module._parameters[key] = p


def _zero3(parameters: list[Any]) -> AbstractContextManager[Any]:
    if not parameters:
        return nullcontext()
    import deepspeed

    return deepspeed.zero.GatheredParameters(parameters)


@contextmanager
def _marked_whole(layers: list[Any]) -> Iterator[None]:
    for layer in layers:
        layer.is_whole = True
    try:
        yield
    finally:
        for layer in layers:
            layer.is_whole = False


def _note_shards(layer: AdapterState) -> None:
    """Remember what an optimizer steps on: its versions tell whether a mask is still the one in force."""
    for name in layer.progress.keys():
        held = [layer.held(kind) for kind in layer.trained_names]
        layer.shards[name] = tuple(holder[name] for holder in held if name in holder)
