"""`adapter_names=[...]`: a mask of its own for each sample of a batch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from ..layers.by_sample import SampleNames
from ..layers.layer import BASE, PruningLayer, pruning_layers
from ..peft_api import AuxiliaryTrainingWrapper
from .verbalizer import label_words_of


# of Transformers' models, those that hand (tokens, batch, features) to some of their layers
_SEQUENCE_FIRST = {"xlnet", "fsmt", "longformer", "led", "mask2former", "oneformer", "omdet-turbo"}
# inputs whose first dimension is the batch, and whose second is the tokens
_TOKENS = ("input_ids", "inputs_embeds", "decoder_input_ids", "decoder_inputs_embeds")


@contextmanager
def routed(model: nn.Module, adapter_names: Sequence[str], settings: Mapping[str, Any]) -> Iterator[None]:
    """While this is entered, sample i of a batch goes through adapter `adapter_names[i]`.

    Args:
        model (`nn.Module`): the tuner.
        adapter_names (`Sequence[str]`): one name for each sample, `"__base__"` for the dense model.
        settings (`Mapping[str, Any]`): arguments of `generate`, which may repeat each sample.

    Raises:
        ValueError: the model is in training mode, a name is unknown, there is not one for each sample, or which rows a
            sample has in some layer is not certain.
    """
    if model.training:
        raise ValueError(
            "Cannot pass `adapter_names` when the model is in training mode. It is for inference only: call "
            "model.eval() first."
        )
    layers = pruning_layers(model)
    known = {name for layer in layers for name in layer._get_available_adapters()} | {BASE}
    unknown = sorted(set(adapter_names) - known)
    if unknown:
        raise ValueError(f"adapter_names has unknown adapters {unknown}. Loaded are {sorted(known)}.")
    _check_no_experts(layers, adapter_names)
    configs = (getattr(module, "config", None) for module in model.modules())
    kinds = {getattr(config, "model_type", None) for config in configs}
    names = SampleNames(adapter_names, _repeats(settings), bool(_SEQUENCE_FIRST & kinds))

    def look(module: nn.Module, args: tuple, kwargs: dict) -> None:
        main = getattr(module, "main_input_name", None)
        given = {main: args[0]} | kwargs if args else kwargs
        found = next((given[name] for name in _TOKENS if isinstance(given.get(name), torch.Tensor)), None)
        if found is not None and found.dim() > 1:
            names.see(found.shape[0], found.shape[1], choices=found.dim() == 3 and not found.is_floating_point())

    def pass_on(module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        # layers find the rows of each name; the wrappers of modules_to_save are PEFT's, and want a name for each
        return args, kwargs | {"adapter_names": names if isinstance(module, PruningLayer) else names.repeated()}

    handles: list[Any] = [
        module.register_forward_pre_hook(look, with_kwargs=True)
        for module in model.modules()
        if isinstance(module, PreTrainedModel)
    ]
    handles += [
        module.register_forward_pre_hook(pass_on, with_kwargs=True)
        for module in model.modules()
        if isinstance(module, (PruningLayer, AuxiliaryTrainingWrapper))
    ]
    try:
        with label_words_of(model, list(adapter_names)):
            yield
    finally:
        for handle in handles:
            handle.remove()


def _repeats(settings: Mapping[str, Any]) -> int:
    """How often `generate` repeats each sample: for its beams, or for several answers to each."""
    config = settings.get("generation_config")
    asked = [settings.get(name) or getattr(config, name, None) for name in ("num_beams", "num_return_sequences")]
    return max(1, *(int(number or 1) for number in asked))


def _check_no_experts(layers: Sequence[PruningLayer], adapter_names: Sequence[str]) -> None:
    """Raise `ValueError` if an expert of a mixture is pruned: it is given tokens of all samples, in any order."""
    for layer in layers if len(set(adapter_names)) > 1 else ():
        if {"expert", "experts"}.isdisjoint(layer.module_name.split(".")):
            continue
        if not layer._get_available_adapters().isdisjoint(adapter_names):
            raise ValueError(
                f"Cannot pass `adapter_names` when {layer.module_name!r} is pruned: an expert sees tokens, and does "
                "not know which sample each belongs to. Pass the samples of each adapter in a separate batch, after "
                "model.set_adapter(...)."
            )
