"""Whole blocks: whether a model can do without some of them, and the model without them."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, Optional

import torch
from torch import nn

from ..peft_api import BaseTunerLayer
from .anatomy import Anatomy, anatomy_of
from .record import FIELD, change_config, write_record
from .sites import Site, find_sites


# the config's lists with an entry for each block
_PER_BLOCK = ("layer_types", "mlp_layer_types", "no_rope_layers")
# its fields by which a block computes something else at another place
_BY_PLACE = ("scale_attn_by_inverse_layer_idx",)


@dataclass(frozen=True)
class Stack:
    """The blocks of a model that can do without some of them.

    Attributes:
        path (`str`): name of their `ModuleList`.
        key (`str`): the same from the backbone on, whatever head the model has.
        blocks (`tuple[str, ...]`): names of the blocks, in order.
        sites (`dict[str, list[Site]]`): heads and neurons of each block.
    """

    path: str
    key: str
    blocks: tuple[str, ...]
    sites: Mapping[str, list[Site]]


def find_stack(model: nn.Module, anatomy: Optional[Anatomy] = None) -> Stack:
    """The blocks of a model, if whole ones can be removed from it.

    Args:
        model (`nn.Module`): a Transformers model, with adapters or without.
        anatomy (`tuple[Block, ...]`, *optional*): by default what is registered for the architecture.

    Raises:
        ValueError: the architecture is not known, or a block without heads and neurons would not hand on what comes in.
    """
    if anatomy is None:
        anatomy = anatomy_of(getattr(getattr(model, "config", None), "model_type", None))
    why = _why_not(anatomy, getattr(model, "config", None))
    if why:
        raise ValueError(f"Whole layers cannot be removed from {type(model).__name__}: {why}")
    sites: dict[str, list[Site]] = {}
    for site in find_sites(model, anatomy):
        sites.setdefault(site.block, []).append(site)
    first = next(iter(sites.values()))[0]
    path = first.block.rpartition(".")[0]
    prefix = len(first.output) - len(first.key)
    blocks = tuple(sorted(sites, key=_number))
    return Stack(path, path[prefix:], blocks, sites)


def has_stack(model: nn.Module, anatomy: Optional[Anatomy] = None) -> bool:
    """Whether whole blocks can be removed from a model."""
    try:
        return len(find_stack(model, anatomy).blocks) > 0
    except ValueError:
        return False


def _why_not(anatomy: Anatomy, config: Any) -> str:
    instead = "Leave keep_layers out; heads and neurons can be removed."
    if len(anatomy) > 1:
        return f"it has several stacks of blocks. {instead}"
    block = anatomy[0]
    if block.repeats:
        return f"its layers share one block. {instead}"
    prenorm = getattr(config, block.prenorm, False) if isinstance(block.prenorm, str) else block.prenorm
    if not prenorm:
        return (
            "its norms come behind attention and feed-forward (post-norm), so a layer without heads and neurons still "
            f"changes what it hands on. {instead}"
        )
    field = next((field for field in _BY_PLACE if getattr(config, field, False)), None)
    return f"with {field}=True a layer computes something else at another place. {instead}" if field else ""


def _number(block: str) -> int:
    return int(block.rpartition(".")[2])


def output_bias(model: nn.Module, sites: Collection[Site]) -> Optional[torch.Tensor]:
    """What a block adds to each token when all its units are gone: shape (out,), `None` for nothing."""
    modules: list[Any] = [model.get_submodule(site.output) for site in sites]
    modules = [module.get_base_layer() if isinstance(module, BaseTunerLayer) else module for module in modules]
    biases = [module.bias.detach() for module in modules if module.bias is not None]
    return torch.stack(biases).sum(0) if biases else None


def remove_blocks(model: nn.Module, names: Collection[str], anatomy: Optional[Anatomy] = None) -> nn.Module:
    """Remove blocks, in place, whose heads and neurons contribute nothing: the model computes the same.

    What their biases add is added by the block before them. The blocks behind move up, with the number by which they
    find their keys and values in a cache, and the config changes along.

    Args:
        model (`nn.Module`): a model without tuner layers.
        names (`Collection[str]`): names of the blocks; not the first one.
        anatomy (`tuple[Block, ...]`, *optional*): by default what is registered for the architecture.

    Raises:
        ValueError: blocks cannot be removed from this model, or not these.
    """
    stack = find_stack(model, anatomy)
    if not set(names) <= set(stack.blocks[1:]):
        raise ValueError(f"names={sorted(names)!r} must be blocks, and not the first: {', '.join(stack.blocks[1:])}.")
    kept = [number for number, name in enumerate(stack.blocks) if name not in names]
    for last, number in zip(kept, [*kept[1:], len(stack.blocks)], strict=True):
        for name in stack.blocks[last + 1 : number]:
            _hand_over_bias(model, stack.sites[name], stack.sites[stack.blocks[last]][-1])
    blocks: Any = model.get_submodule(stack.path)
    for number in reversed(range(len(stack.blocks))):
        if number not in kept:
            del blocks[number]  # and those behind move up
    for number, block in enumerate(blocks):
        for module in block.modules():
            if isinstance(getattr(module, "layer_idx", None), int):
                module.layer_idx = number
    _change_config(model, stack, kept)
    return model


def _hand_over_bias(model: nn.Module, sites: list[Site], to: Site) -> None:
    bias = output_bias(model, sites)
    if bias is not None:
        target: Any = model.get_submodule(to.output).bias
        with torch.no_grad():
            target.add_(bias.to(target))


def _change_config(model: nn.Module, stack: Stack, kept: list[int]) -> None:
    config: Any = getattr(model, "config", None)
    fields: dict[str, Any] = {"num_hidden_layers": len(kept)}
    for name in _PER_BLOCK:
        entries = getattr(config, name, None)
        if isinstance(entries, (list, tuple)) and len(entries) == len(stack.blocks):
            fields[name] = [entries[number] for number in kept]
    places = {f"{stack.key}.{old}": f"{stack.key}.{new}" for new, old in enumerate(kept)}
    record = {}
    for key, entry in dict(getattr(config, FIELD, None) or {}).items():
        block = re.match(re.escape(stack.key) + r"\.\d+(?=\.)", key)
        if block is None:
            record[key] = entry
        elif block[0] in places:
            record[places[block[0]] + key[block.end() :]] = entry
    record[stack.key] = write_record(record.get(stack.key), torch.tensor(kept), len(stack.blocks))
    change_config(model, **fields, **{FIELD: record})
