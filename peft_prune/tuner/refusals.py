"""Why a module cannot be pruned, in words that say what to do instead."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import nn

from ..matching import pattern_of
from ..peft_api import BaseTunerLayer
from ..quantization import SUPPORTED, quantization_of
from .weight_readers import reads_weight_of


_LEAVE_OUT = "Remove it from `target_modules`, or name it in `exclude_modules`."


def check_is_called(parent: nn.Module, child: str, name: str) -> None:
    """Raise `TypeError` if a module is not called by the one it belongs to, which uses its weight instead."""
    if isinstance(parent, nn.TransformerEncoderLayer) and reads_weight_of(parent, child):
        raise TypeError(
            f"Module {name!r} cannot be pruned: in eval mode torch.nn.TransformerEncoderLayer has a fast path that "
            "reads the weights of its children without calling them, and would ignore the mask. Switch it off "
            "first, wherever the adapter is used: torch.backends.mha.set_fastpath_enabled(False)."
        )
    if reads_weight_of(parent, child):
        raise TypeError(
            f"Module {name!r} cannot be pruned: {type(parent).__name__} reads its weight without calling it, and "
            f"would ignore the mask. {_LEAVE_OUT}"
        )


def check_patterns(patterns: Iterable[str], names: Sequence[str]) -> None:
    """Raise `ValueError` if a key of `sparsity_pattern` matches none of the modules to be pruned."""
    for key in patterns:
        if not any(pattern_of([key], name) == key for name in names):
            raise ValueError(
                f"sparsity_pattern[{key!r}] matches none of the {len(names)} pruned modules, for instance "
                f"{names[0]!r}. Correct the name, or remove the entry."
            )


def parents_of_modules(model: nn.Module) -> dict[int, list[nn.Module]]:
    """The modules that each module belongs to, by its `id`."""
    parents: dict[int, list[nn.Module]] = {}
    for parent in model.modules():
        for child in {id(child) for child in parent._modules.values() if child is not None}:
            parents.setdefault(child, []).append(parent)
    return parents


def check_place(model: nn.Module, name: str, parents: Sequence[nn.Module]) -> None:
    """Raise `TypeError` if a module is not called by its parent, or has several: PEFT would replace it in one only.

    Args:
        model (`nn.Module`): the model.
        name (`str`): the module's name in it.
        parents (`Sequence[nn.Module]`): all that it belongs to, of [`parents_of_modules`].
    """
    parent, _, child = name.rpartition(".")
    check_is_called(model.get_submodule(parent), child, name)
    if len(parents) > 1:
        kinds = sorted(type(parent).__name__ for parent in parents)
        raise TypeError(
            f"Module {name!r} cannot be pruned: it is shared by {len(parents)} modules ({', '.join(kinds)}), and would "
            f"be pruned in one of them only. {_LEAVE_OUT}"
        )


def check_no_weight_is_shared(model: nn.Module, layers: Sequence[Any]) -> None:
    """Raise `ValueError` if the weight of a pruned layer is that of another module, too, pruned or not."""
    owners: dict[int, list[tuple[str, nn.Module]]] = {}
    for name, module in model.named_modules():
        for parameter in module._parameters.values():
            if parameter is not None:
                owners.setdefault(id(parameter), []).append((name.removesuffix(".base_layer"), module))
    for layer in layers:
        base = layer.get_base_layer()
        others = [name for name, owner in owners.get(id(base._parameters.get("weight")), []) if owner is not base]
        if others:
            raise ValueError(
                f"{layer.module_name!r} shares its weight with {others[0]!r}, so merging the mask would prune that "
                "too. Load the base model with `tie_word_embeddings=False`, or remove the module from "
                "`target_modules`."
            )


def refuse(module: nn.Module, name: str, classes: Iterable[type[nn.Module]]) -> TypeError:
    """The error for a module that none of the layer classes fits."""
    if isinstance(module, BaseTunerLayer):
        return TypeError(
            f"Module {name!r} is adapted already, by {type(module).__module__}.{type(module).__name__}, which a "
            "mask on its base weight would ignore. Merge that adapter first: model = model.merge_and_unload()."
        )
    kind, quantization = type(module).__name__, quantization_of(module)
    supported = ", ".join(f"{cls.__module__.split('.')[0]}'s {cls.__name__}" for cls in classes)
    if quantization is not None:
        fix = "" if quantization in SUPPORTED else f" Supported are quantised weights of {', '.join(SUPPORTED)}."
        return TypeError(
            f"Module {name!r} of type {kind} cannot be pruned by this method, because its weight is quantised: "
            f"{quantization}.{fix} Load the base model without quantization_config."
        )
    why = f"Supported are {supported}, and subclasses that do not override forward and have their own weight."
    if isinstance(module, nn.MultiheadAttention):
        why = "It hands its weights to a function, which would ignore a mask."
    elif isinstance(getattr(module, "weight", None), torch.Tensor) and "weight" not in module._parameters:
        why = "Its weight is computed from other parameters (weight_norm, parametrize). Remove that first."
    elif getattr(module, "max_norm", None) is not None:
        why = "Its weight changes when it is called (max_norm)."
    return TypeError(f"Module {name!r} of type {kind} cannot be pruned. {why} {_LEAVE_OUT}")
