"""Linear layers of a model in the form that is fastest where they run, and back."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from typing import Any, Optional, Union

from peft import PeftModel
from torch import nn
from transformers.pytorch_utils import Conv1D

from ..peft_api import AuxiliaryTrainingWrapper, BaseTuner, BaseTunerLayer
from . import semi_structured
from .choice import Choice, Timer, candidates, choose, wall_time
from .report import LayerForm, SparseReport
from .sparse_linear import SparseLinear, out_in


def use_sparse_kernels(
    model: nn.Module,
    *,
    tokens: Union[int, Sequence[int]] = 128,
    margin: float = 1.1,
    timer: Optional[Timer] = None,
) -> SparseReport:
    """
    Give each pruned linear layer the form that is fastest where it runs, in place, for inference.

    Call it on a plain model, after `merge_and_unload` and after the last `.to(device, dtype)`. For each `nn.Linear` and
    Transformers' `Conv1D`, dense is timed against CSR, and against `"2:4"` on GPUs that have it, on random
    activations, with the current device, dtype and number of threads. A layer stays dense unless a sparse form is
    clearly faster. Layers of one shape and about one density (a tenth apart) are measured together, one after the other
    as in the model.

    Converted layers are [`SparseLinear`]. `state_dict` and `save_pretrained` give the dense weights. Layers whose
    weight another module shares, and layers with hooks, are not changed.

    Args:
        model (`nn.Module`): without adapters.
        tokens (`int` or sequence of `int`): rows of activations that a layer sees in a call, that is batch × length;
            1 for generation of one sequence with a cache. With several numbers, a form must win at each.
        margin (`float`): a sparse form is used if dense takes at least this many times as long.
        timer (function, *optional*): calls a function without arguments and returns seconds; by default wall
            time.

    Returns:
        [`SparseReport`]: a list of [`LayerForm`], one for each linear layer.

    Raises:
        ValueError: adapters are still in the model, or `tokens` or `margin` is less than 1.
    """
    sizes = _check(model, tokens, margin)
    use_dense_kernels(model)
    layers = _linear_layers(model)
    densities = {name: float((layer.weight != 0).sum()) / layer.weight.numel() for name, layer in layers}
    kinds: dict[tuple[Any, ...], dict[str, Any]] = {}
    for name, layer in layers:
        kinds.setdefault(_kind(layer, densities[name]), {})[name] = layer
    choices: dict[str, Choice] = {}
    for kind in kinds.values():
        name, first = next(iter(kind.items()))
        found = candidates(out_in(first), densities[name], sizes)
        choices |= dict.fromkeys(kind, choose(list(kind.values()), found, sizes, margin, timer or wall_time))
    for name, layer in layers:
        if choices[name].form != "dense":
            _replace(model, name, choices[name].convert(layer))
    return SparseReport(
        LayerForm(name, tuple(out_in(layer).shape), densities[name], choices[name].form, choices[name].speed_up)
        for name, layer in layers
    )


def use_dense_kernels(model: nn.Module) -> nn.Module:
    """
    Undo [`use_sparse_kernels`], in place; the weights stay frozen.

    Args:
        model (`nn.Module`): any model.

    Returns:
        `nn.Module`: the same model.
    """
    for name, layer in list(model.named_modules()):
        if isinstance(layer, SparseLinear) and name:
            _replace(model, name, layer.dense())
    return model


def _kind(layer: Any, density: float) -> tuple[Any, ...]:
    """What a measurement depends on: layers of one kind share it."""
    weight, tenth = layer.weight, round(math.log(max(density, 1e-9), 1.1))
    pattern = semi_structured.can_run(out_in(layer))
    return type(layer), layer.bias is None, weight.shape, weight.dtype, weight.device, tenth, pattern


def _replace(model: nn.Module, name: str, layer: nn.Module) -> None:
    parent, _, last = name.rpartition(".")
    setattr(model.get_submodule(parent), last, layer)


def _linear_layers(model: nn.Module) -> list[tuple[str, Any]]:
    """Layers that can be replaced: exactly `nn.Linear` or `Conv1D`, with a weight of their own and no hooks."""
    owners = Counter(id(p) for module in model.modules() for p in module._parameters.values() if p is not None)
    found = []
    for name, layer in model.named_modules():
        if type(layer) not in (nn.Linear, Conv1D) or not name:
            continue
        hooks = layer._forward_hooks or layer._forward_pre_hooks or hasattr(layer, "_hf_hook")
        if owners[id(layer.weight)] == 1 and not hooks and not layer.weight.is_meta:
            found.append((name, layer))
    return found


def _check(model: nn.Module, tokens: Union[int, Sequence[int]], margin: float) -> tuple[int, ...]:
    """`tokens` as a tuple."""
    if any(isinstance(m, (PeftModel, BaseTuner, BaseTunerLayer, AuxiliaryTrainingWrapper)) for m in model.modules()):
        raise ValueError("The model has adapters. Call `model = model.merge_and_unload()` first, then this.")
    if isinstance(model, (nn.Linear, Conv1D)):
        raise ValueError(
            f"model={type(model).__name__}: a single layer cannot be replaced; pass a model that contains it."
        )
    sizes = tuple(tokens) if isinstance(tokens, (list, tuple)) else (tokens,)
    if not sizes or not all(type(size) is int and size >= 1 for size in sizes):
        raise ValueError(f"tokens={tokens!r}: must be a whole number of rows, at least 1, or several such numbers.")
    if not margin >= 1:
        raise ValueError(f"margin={margin} must be at least 1; less would choose forms slower than dense.")
    return sizes
