"""Stacks of numbered blocks, by the names of their layers."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, field

from torch import nn


_BLOCK = re.compile(r"(?P<stack>.*?)\.(?P<number>\d+)\..+")


@dataclass
class Stack:
    """Numbered blocks that follow each other, and the watched layers inside each."""

    path: str
    blocks: dict[int, nn.Module] = field(default_factory=dict)
    layers: dict[int, list[str]] = field(default_factory=dict)


def find_stacks(model: nn.Module, names: Iterable[str]) -> tuple[list[Stack], list[str]]:
    """Stacks of blocks that hold the named layers, in the order of the model, and the layers outside of all."""
    stacks: dict[str, Stack] = {}
    outside = []
    for name in names:
        match = _BLOCK.fullmatch(name)
        if match is None:
            outside.append(name)
            continue
        stack = stacks.setdefault(match["stack"], Stack(match["stack"]))
        stack.layers.setdefault(int(match["number"]), []).append(name)
    for stack in stacks.values():
        children = model.get_submodule(stack.path).named_children()
        stack.blocks = {int(key): block for key, block in children if key.isdigit()}
    order = [path for path, _ in model.named_modules()]
    return sorted(stacks.values(), key=lambda stack: order.index(stack.path)), outside
