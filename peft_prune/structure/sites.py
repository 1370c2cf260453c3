"""The heads and neurons of one model: which rows and columns of which matrices belong to each of them."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Optional

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from ..peft_api import BaseTunerLayer
from ..quantization import dequantized_weight
from .anatomy import Anatomy, Attention, FeedForward, anatomy_of


HEADS, NEURONS = "heads", "neurons"
_HEAD_WIDTH = ("head_dim", "attention_head_size", "head_size", "key_value_proj_dim")


@dataclass(frozen=True)
class Site:
    """An attention or a feed-forward network whose units can be removed.

    A unit is a neuron, a head, or where heads share keys and values, the whole group of them.

    Attributes:
        kind (`str`): `"heads"` or `"neurons"`.
        output (`str`): name of the module whose columns the units are.
        columns (`torch.Tensor`): int64, shape (units, columns a unit), those of `output`.
        rows (`dict[str, torch.Tensor]`): for each module that makes the units, int64, shape (units, rows a unit).
        key (`str`): name of `output` from the backbone on, the same whatever head the model has.
        block (`str`): name of the block.
        module (`str`): name of the attention, or of the block for neurons.
        attention (`Attention`, *optional*): its entry in the anatomy.
        decoder (`bool`): whether it sees the decoder's tokens.
        repeats (`int`): how often it runs in a forward pass.
    """

    kind: str
    output: str
    columns: torch.Tensor
    rows: Mapping[str, torch.Tensor]
    key: str
    block: str
    module: str
    attention: Optional[Attention] = None
    decoder: bool = False
    repeats: int = 1

    @property
    def units(self) -> int:
        """Number of units."""
        return self.columns.shape[0]

    @property
    def width(self) -> int:
        """Columns of `output` that belong to a unit."""
        return self.columns.shape[1]


def linear_matrix(module: nn.Module) -> torch.Tensor:
    """The weight of an `nn.Linear` or `Conv1D` as (out, in), also inside a tuner's layer; dequantised."""
    base = module.get_base_layer() if isinstance(module, BaseTunerLayer) else module
    if isinstance(getattr(type(base), "weight", None), property):
        raise ValueError(
            f"The weight of a {type(base).__name__} is made when it is asked for, so no rows or columns can be taken "
            "out of it. If it comes from use_sparse_kernels, call peft_prune.use_dense_kernels(model) first."
        )
    weight = dequantized_weight(base)
    return weight.T if isinstance(base, Conv1D) else weight


def linear_shape(module: nn.Module) -> tuple[int, int]:
    """(out, in) of an `nn.Linear` or `Conv1D`, also inside a tuner's layer."""
    base = module.get_base_layer() if isinstance(module, BaseTunerLayer) else module
    if isinstance(base, nn.Linear):  # whose weight may be packed
        return base.out_features, base.in_features
    rows, columns = linear_matrix(module).shape
    return int(rows), int(columns)


def find_sites(model: nn.Module, anatomy: Optional[Anatomy] = None) -> list[Site]:
    """Find every attention and feed-forward network of a model.

    Args:
        model (`nn.Module`): a Transformers model, with adapters or without.
        anatomy (`tuple[Block, ...]`, *optional*): where heads and neurons live, by default what is registered for
            `model.config.model_type`.

    Raises:
        ValueError: the architecture is not known, or the model does not look as its anatomy says.
    """
    if anatomy is None:
        anatomy = anatomy_of(getattr(getattr(model, "config", None), "model_type", None))
    modules = dict(model.named_modules())
    sites = []
    for block in anatomy:
        pattern = re.compile(r"(?P<prefix>(?:.*\.)?)" + re.escape(block.name).replace(r"\*", r"\d+"))
        found = [match for match in map(pattern.fullmatch, modules) if match]
        runs = getattr(getattr(model, "config", None), block.repeats, 1) if block.repeats else len(found)
        for match in found:
            place = _Place(modules, match[0], len(match["prefix"]), block.decoder, max(1, runs // len(found)))
            sites += [_heads(place, entry) for entry in block.attentions]
            sites += [_neurons(place, entry) for entry in block.feed_forwards]
    if not sites:
        names = " or ".join(repr(block.name) for block in anatomy)
        raise ValueError(f"{type(model).__name__} has no blocks named {names}, where its anatomy says they are.")
    return sites


@dataclass(frozen=True)
class _Place:
    """A block of a model."""

    modules: Mapping[str, nn.Module]
    name: str
    prefix: int  # characters of `name` before the backbone
    decoder: bool
    repeats: int

    def full(self, name: str) -> str:
        return f"{self.name}.{name}"

    def get(self, name: str) -> nn.Module:
        try:
            return self.modules[self.full(name)]
        except KeyError:
            raise ValueError(
                f"Block {self.name!r} has no module {name!r}, where the anatomy of its architecture says there is one. "
                "Describe the architecture with peft_prune.register_anatomy."
            ) from None

    def site(self, kind: str, output: str, columns: torch.Tensor, rows: dict[str, torch.Tensor], **more: Any) -> Site:
        full = self.full(output)
        return Site(
            kind=kind,
            output=full,
            columns=columns,
            rows={self.full(name): index for name, index in rows.items()},
            key=full[self.prefix :],
            block=self.name,
            decoder=self.decoder,
            repeats=self.repeats,
            **more,
        )


def head_width(attention: nn.Module) -> int:
    """Width of a head, by whatever name the attention has for it."""
    for name in _HEAD_WIDTH:
        if isinstance(getattr(attention, name, None), int):
            return getattr(attention, name)
    raise ValueError(f"{type(attention).__name__} does not say how wide a head is: none of {', '.join(_HEAD_WIDTH)}.")


def _runs(units: int, width: int, start: int = 0) -> torch.Tensor:
    """Indices of consecutive runs: int64, shape (units, width)."""
    return torch.arange(start, start + units * width).view(units, width)


def _heads(place: _Place, entry: Attention) -> Site:
    width = head_width(place.get(entry.module))
    heads = linear_shape(place.get(entry.output))[1] // width
    rows: dict[str, torch.Tensor] = {}
    if entry.fused and entry.layout == "interleaved":
        units, rows[entry.query] = heads, _runs(heads, 3 * width)
    elif entry.fused:
        units = heads
        rows[entry.query] = torch.cat([_runs(heads, width, start=part * heads * width) for part in range(3)], dim=1)
    else:
        units = linear_shape(place.get(entry.key))[0] // width
        rows[entry.query] = _runs(units, heads // units * width)
        for name in (entry.key, entry.value, *entry.also):
            if name not in entry.also or place.full(name) in place.modules:
                rows[name] = _runs(units, width)
    columns = _runs(units, heads // units * width)
    return place.site(HEADS, entry.output, columns, rows, module=place.full(entry.module), attention=entry)


def _neurons(place: _Place, entry: FeedForward) -> Site:
    units = linear_shape(place.get(entry.down))[1]
    present = [name for name in entry.up if place.full(name) in place.modules]
    if not present:
        place.get(entry.up[0])  # raises
    rows = torch.cat([_runs(units, 1, start=part * units) for part in range(entry.fused)], dim=1)
    return place.site(NEURONS, entry.down, _runs(units, 1), dict.fromkeys(present, rows), module=place.name)
