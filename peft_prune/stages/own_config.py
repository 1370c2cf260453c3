"""A config of its own for an adapter that becomes final: the one that the user gave may serve for others, too."""

from __future__ import annotations

import copy

from torch import nn

from ..config import PruningConfig
from ..layers.layer import pruning_layers


def own_config(model: nn.Module, adapter_name: str) -> PruningConfig:
    """Put a copy in the place of an adapter's config, wherever it is held, and return the copy.

    Args:
        model (`nn.Module`): any model that contains pruning layers with this adapter.
        adapter_name (`str`): the adapter.
    """
    layers = pruning_layers(model, adapter_name)
    given = layers[0].config(adapter_name)
    holders = [getattr(module, "peft_config", None) for module in model.modules()]
    found = [holder for holder in holders if isinstance(holder, dict) and holder.get(adapter_name) is given]
    if not found:
        return given  # a part of a model: what is saved with the whole of it is out of reach
    config = copy.copy(given)
    for holder in found:
        holder[adapter_name] = config
    for layer in layers:
        layer.host[adapter_name].config = config
    return config
