"""`adapter_names=[...]`: a mask of its own for each sample of a batch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Optional

from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn

from .layer import BASE, PruningLayer, pruning_layers
from .verbalizer import label_words_of


@contextmanager
def routed(model: nn.Module, adapter_names: Sequence[str], num_beams: Optional[int] = None) -> Iterator[None]:
    """While this is entered, sample i of a batch goes through adapter `adapter_names[i]`.

    Args:
        model (`nn.Module`): the tuner.
        adapter_names (`Sequence[str]`): one name for each sample, `"__base__"` for the dense model.
        num_beams (`int`, *optional*): beams of `generate`, which repeats each sample so many times.

    Raises:
        ValueError: the model is in training mode, or a name is unknown.
    """
    if model.training:
        raise ValueError(
            "Cannot pass `adapter_names` when the model is in training mode. It is for inference only: call "
            "model.eval() first."
        )
    known = {name for layer in pruning_layers(model) for name in layer._get_available_adapters()} | {BASE}
    unknown = sorted(set(adapter_names) - known)
    if unknown:
        raise ValueError(f"adapter_names has unknown adapters {unknown}. Loaded are {sorted(known)}.")
    names = list(adapter_names)
    # layers repeat names to the number of rows they see; the wrappers of modules_to_save are PEFT's, and do not
    repeated = [name for name in names for _ in range(num_beams or 1)]

    def pass_on(module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        return args, kwargs | {"adapter_names": names if isinstance(module, PruningLayer) else repeated}

    handles: list[Any] = [
        module.register_forward_pre_hook(pass_on, with_kwargs=True)
        for module in model.modules()
        if isinstance(module, (PruningLayer, AuxiliaryTrainingWrapper))
    ]
    try:
        with label_words_of(model, names):
            yield
    finally:
        for handle in handles:
            handle.remove()
