"""What no mask covers: norms, embeddings, biases, heads. It has to be the base's, or is stored in full."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable
from typing import Any, Optional

import torch
from torch import nn

from ..peft_api import ModulesToSaveWrapper
from .matrices import all_agree
from .names import Names
from .sources import Weights


def check_structure(model: nn.Module, source: Weights, names: Names) -> None:
    """Raise `ValueError` if the sparse model lacks a tensor of the base, or has one of another shape."""
    for name, tensor in model.state_dict().items():
        if not isinstance(tensor, torch.Tensor):
            continue
        shape = source.shape(names.require(name))
        if tuple(tensor.shape) != shape:
            raise ValueError(
                f"{name!r} is {tuple(tensor.shape)} in the base model, but {shape} in {source.label}: it was made "
                "from another model."
            )


def check_others(
    model: nn.Module,
    source: Weights,
    names: Names,
    targets: Collection[str],
    modules_to_save: Optional[list[str]],
    random: Collection[str],
) -> list[str]:
    """Compare all tensors but those that masks are for.

    Args:
        model (`nn.Module`): the base model.
        source ([`Weights`]): the sparse model's tensors.
        names ([`Names`]): which is which.
        targets (`Collection[str]`): names of modules whose weights masks are for.
        modules_to_save (`list[str]`, *optional*): modules that are stored in full.
        random (`Collection[str]`): tensors of the base that no file has.

    Returns:
        `list[str]`: tensors that differ, or that chance has filled, and lie in `modules_to_save`.

    Raises:
        ValueError: others differ; the message names them.
    """
    covered = {f"{name}.weight" for name in targets}
    differing = []
    for name, tensor in model.state_dict().items():
        if name in covered or not isinstance(tensor, torch.Tensor):
            continue
        if name in random or not all_agree(tensor, source.get(names.require(name))):
            differing.append(name)
    saved = [name for name in differing if _is_saved(name, modules_to_save)]
    left = [name for name in differing if name not in saved]
    if left:
        raise ValueError(_what_differs(model, source.label, left, targets, modules_to_save, random))
    return saved


def _is_saved(name: str, modules_to_save: Optional[list[str]]) -> bool:
    """Whether a tensor lies in a module that PEFT stores in full."""
    parts = name.split(".")
    modules = [".".join(parts[:end]) for end in range(1, len(parts))]
    return any(module.endswith(entry) for module in modules for entry in modules_to_save or ())


def _what_differs(
    model: nn.Module,
    label: str,
    names: list[str],
    targets: Collection[str],
    modules_to_save: Optional[list[str]],
    random: Collection[str],
) -> str:
    shown = ", ".join(map(repr, names[:3])) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
    problem = f"{label} differs from the base model in {shown}, which no mask covers, so an adapter would lose that."
    if absent := [name for name in names if name in random]:
        problem += f" The base has no {absent[0]!r}."
    biases = [name for name in names if name.rpartition(".")[0] in targets]
    if biases:
        return (
            f"{problem} A bias of a pruned module, such as {biases[0]!r}, cannot be stored with its mask: the model "
            "was trained after this base. As base, use the dense model that it was pruned from."
        )
    modules = [name.rpartition(".")[0] for name in names]
    if "" in modules:
        return f"{problem} {names[modules.index('')]!r} belongs to no module that could be stored in full."
    offer = sorted({*(modules_to_save or ()), *_shortened(model, modules, targets)})
    return f"{problem} Name matrices that are pruned too in target_modules, or store in full modules_to_save={offer}."


def _shortened(model: nn.Module, modules: list[str], targets: Collection[str]) -> Iterable[str]:
    """Modules by the ends of their names, where many have the same, and no pruned one has it."""
    every = [name for name, _ in model.named_modules()]
    for module in dict.fromkeys(modules):
        end = module.rpartition(".")[2]
        alike = [name for name in every if name.endswith(end)]
        is_short = len(alike) > 1 and set(alike) <= set(modules) and not any(name.endswith(end) for name in targets)
        yield end if is_short else module


def check_saved(targets: Collection[str], modules_to_save: Optional[list[str]]) -> None:
    """Raise `ValueError` if PEFT would store a pruned module in full as well, since its name ends alike."""
    for entry in modules_to_save or ():
        clash = next((name for name in targets if re.search(rf"{re.escape(entry)}$", name)), None)
        if clash is not None:
            raise ValueError(
                f"modules_to_save={modules_to_save!r}: PEFT saves every module whose name ends with {entry!r}, such "
                f"as {clash!r}, which is pruned. Give a longer name."
            )


@torch.no_grad()
def copy_saved(model: nn.Module, adapter_name: str, source: Weights, names: Names) -> set[str]:
    """Fill the modules that are stored in full from the sparse model.

    Returns:
        `set[str]`: names of tensors in the base model that were copied.
    """
    copied = set()
    for path, module in model.named_modules():
        if isinstance(module, ModulesToSaveWrapper) and adapter_name in module.modules_to_save:
            where = path.removeprefix("base_model.model.")
            saved: Any = module.modules_to_save[adapter_name]
            for key, tensor in saved.state_dict().items():
                tensor.copy_(source.get(names.require(f"{where}.{key}")))
                copied.add(f"{where}.{key}")
    return copied
