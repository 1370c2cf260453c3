"""What is pruned if nobody names it."""

from __future__ import annotations

import re
from collections.abc import Iterator

from torch import nn

from ..layers.linear import LAYER_CLASSES, layer_class_for
from ..peft_api import BaseTunerLayer
from ..quantization import SUPPORTED, quantization_of
from .refusals import refuse
from .weight_readers import reads_weight_of


# "encoder.layer.3.attention.self.query" -> the part below the block's number
IN_BLOCK = re.compile(r"(?:^|.*?\.)[^.\d][^.]*\.\d+\.(?P<suffix>.+)")


def base_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Modules by name as they are without adapters."""
    inside: tuple[str, ...] = ()
    for name, module in model.named_modules():
        if inside and name.startswith(inside):
            continue
        if isinstance(module, BaseTunerLayer):
            inside += (name + ".",)
            yield name, module.get_base_layer()
        else:
            yield name, module


def default_target_modules(model: nn.Module) -> set[str]:
    """Suffixes of the linear layers inside the numbered blocks of a model: no head, no pooler, no embeddings.

    Suffixes and not full names, because `layers_to_transform` does not apply to names given in full.

    Raises:
        ValueError: the model has no such layers.
    """
    suffixes = set()
    for name, base in base_modules(model):
        # of what is adapted already, too, only linear layers: others have to be named
        match = IN_BLOCK.fullmatch(name)
        if match is None or layer_class_for(base) is None:
            continue
        parent, _, child = name.rpartition(".")
        if not reads_weight_of(model.get_submodule(parent), child):
            suffixes.add(match["suffix"])
    if not suffixes:
        for name, module in model.named_modules():
            if isinstance(module, nn.Linear) and quantization_of(module) not in (None, *SUPPORTED):
                raise refuse(module, name, LAYER_CLASSES)
        raise ValueError(
            f"target_modules was not given, and {type(model).__name__} has no linear layers inside numbered blocks "
            "(names like 'encoder.layer.0.output.dense'). Please specify `target_modules`, the modules to prune."
        )
    return suffixes
