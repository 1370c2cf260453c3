"""The base model that a sparse checkpoint was made from, and the matrices in it that masks are for."""

from __future__ import annotations

import os
from collections.abc import Iterable
from typing import Any, Optional

import torch
import transformers
from torch import nn
from transformers import AutoConfig, PreTrainedModel

from ..layers.layer import PruningLayer
from ..layers.linear import layer_class_for
from ..matching import is_target
from ..methods.imported import TUNER, targets_config
from ..peft_api import BaseTunerLayer, include_all_linear
from ..quantization import quantization_of
from ..tuner.refusals import check_no_weight_is_shared, check_place, parents_of_modules, refuse
from ..tuner.targets import default_target_modules


def load_base(base: Any, architecture: Optional[str]) -> tuple[nn.Module, list[str]]:
    """The base model, and names of its parameters that no file has, so that chance has filled them.

    Args:
        base: a model, or a folder or Hub id; it is loaded in the dtype that it is stored in.
        architecture (`str`, *optional*): class of the sparse model, by default the one that the base's config names.

    Raises:
        ValueError: it cannot serve as base, or its class is not known.
    """
    if isinstance(base, nn.Module):
        check_base(base)
        return base, []
    if not isinstance(base, (str, os.PathLike)):
        raise TypeError(f"base must be a model, a path or a Hub id, not {type(base).__name__}.")
    name = architecture or next(iter(AutoConfig.from_pretrained(base).architectures or []), None)
    # what Transformers offers by itself: nothing is imported by a name from a file
    found = getattr(transformers, str(name), None)
    if not (isinstance(found, type) and issubclass(found, PreTrainedModel)):
        raise ValueError(
            f"The class of the model, {name!r} by its config, is not part of Transformers. Load the models and pass "
            "them: mask_from_zeros(base_model, sparse_model)."
        )
    loaded: Any = found.from_pretrained(base, dtype="auto", output_loading_info=True)
    model, loading = loaded
    check_base(model)
    return model, sorted(loading["missing_keys"])


def check_base(model: nn.Module) -> None:
    """Raise `ValueError` if a model has adapters, or weights that cannot be compared."""
    for name, module in model.named_modules():
        if isinstance(module, BaseTunerLayer):
            raise ValueError(
                f"base holds an adapter, at {name!r}. Pass the model itself, for instance what "
                "AutoModelForCausalLM.from_pretrained returns."
            )
        if quantization_of(module) is not None:
            raise ValueError(
                f"base is quantised ({name!r}: {quantization_of(module)}), so its weights cannot be compared. Import "
                "with the base in its own dtype; the adapter then loads on the quantised one if it holds masks only."
            )
    for name, parameter in model.named_parameters():
        if parameter.is_meta:
            raise ValueError(f"base: {name!r} is not loaded (device 'meta'). Load it without offloading.")


def find_matrices(
    model: nn.Module, target_modules: Any, modules_to_save: Optional[list[str]]
) -> dict[str, PruningLayer]:
    """Matrices that may have been pruned, as layers that are not part of the model, by module name.

    Args:
        model (`nn.Module`): the base model.
        target_modules: as in [`PruningConfig`]; by default the linear layers inside the numbered blocks.
        modules_to_save (`list[str]`, *optional*): modules that are stored in full instead.

    Raises:
        ValueError: there are none.
        TypeError: a module cannot be pruned; the message names it.
    """
    targets: Any = default_target_modules(model) if target_modules is None else target_modules
    config: Any = targets_config(targets, modules_to_save)
    config = include_all_linear(config, model)
    found = layers_of(model, (name for name, _ in model.named_modules() if name and is_target(config, name)))
    if not found:
        raise ValueError(f"target_modules={target_modules!r} matches no module of {type(model).__name__}.")
    return found


def layers_of(model: nn.Module, names: Iterable[str]) -> dict[str, PruningLayer]:
    """Layers that show weights of modules as (out, in), by module name.

    Raises:
        TypeError: a module cannot be pruned; the message names it.
        ValueError: it shares its weight with another module.
    """
    parents, found = parents_of_modules(model), {}
    for name in names:
        module = model.get_submodule(name)
        layer_class = layer_class_for(module, TUNER.layer_classes)
        if layer_class is None:
            raise refuse(module, name, TUNER.layer_classes)
        check_place(model, name, parents[id(module)])
        found[name] = layer_class(module, TUNER.prefix, name)
    check_no_weight_is_shared(model, list(found.values()))
    return found


def matrix_of(layer: PruningLayer, tensor: torch.Tensor) -> torch.Tensor:
    """A tensor in the layout of a layer's weight as (out, in), where that weight is."""
    return layer._as_matrix(tensor.to(layer.weight.device))
