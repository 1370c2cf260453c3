"""Modules that read the weight of a child instead of calling it. A mask on such a child would be ignored silently.

`nn.MultiheadAttention` hands `self.out_proj.weight` to a function; Mamba does so with its projections, WavLM with its
queries. What a class does is read off its source.
"""

from __future__ import annotations

import ast
import inspect
import textwrap
from collections.abc import Hashable
from functools import cache
from typing import cast

import torch
from torch import nn


_MADE_ONCE = ("__init__", "init_weights", "_init_weights", "reset_parameters", "_reset_parameters")
_HARMLESS = {"dtype", "device", "shape", "ndim", "requires_grad", "is_cuda", "size", "dim", "new_zeros"}


@cache
def children_read_by(kind: type[nn.Module]) -> frozenset[str]:
    """Names of the children whose weights the methods of a class read, not counting looks at dtype and the like."""
    found: set[str] = set()
    for base in kind.__mro__:
        if issubclass(base, nn.Module) and base is not nn.Module:
            found |= _read_in(base)
    return frozenset(found)


def _read_in(kind: type) -> set[str]:
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(kind)))
    except (OSError, TypeError, SyntaxError):
        return set()  # a class made at run time
    functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef) and node.name not in _MADE_ONCE]
    nodes = [node for function in functions for node in ast.walk(function)]
    harmless = {id(node.value) for node in nodes if isinstance(node, ast.Attribute) and node.attr in _HARMLESS}
    for node in nodes:
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in ("isinstance", "hasattr"):
            harmless |= {id(argument) for argument in node.args}
    return {
        node.value.attr
        for node in nodes
        if isinstance(node, ast.Attribute) and node.attr == "weight" and id(node) not in harmless
        if isinstance(node.value, ast.Attribute)
        if isinstance(node.value.value, ast.Name) and node.value.value.id == "self"
    }


def reads_weight_of(parent: nn.Module, child: str) -> bool:
    """Whether a module uses the weight of one of its children without calling it."""
    if isinstance(parent, nn.TransformerEncoderLayer):
        # only its fast path does, which can be switched off
        return torch.backends.mha.get_fastpath_enabled()
    if not getattr(parent, "slow_but_exact", True):
        return False  # Bloom's way around tensor parallelism, switched off
    if type(parent).__name__ == "DisentangledSelfAttention" and child == "in_proj":
        return False  # DeBERTa does so for separate queries only, which its models never have (z_steps is 0)
    return child in children_read_by(cast(Hashable, type(parent)))
