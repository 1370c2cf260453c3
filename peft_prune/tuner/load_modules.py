"""Modules that an adapter brings, such as a classifier: do they fit, and what if not?"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from peft import PeftModel
from torch import nn

from ..layers.layer import pruning_layers


def check_saved_modules(stored: Mapping[str, torch.Tensor], model: nn.Module, adapter_name: str) -> None:
    """Compare modules that were saved beside the masks with those of the model.

    Args:
        stored: tensors by the model's own keys, adapter name included.
        model (`nn.Module`): the model that the adapter is loaded into.
        adapter_name (`str`): name of the adapter.

    Raises:
        ValueError: a tensor has another shape; nothing is copied then.
    """
    marker = f".modules_to_save.{adapter_name}."
    present = {name: tensor for name, tensor in model.state_dict().items() if marker in name}
    for key, found in stored.items():
        if key in present and found.shape != present[key].shape:
            module = key.split(".modules_to_save.")[0].removeprefix("base_model.model.")
            raise ValueError(
                f"Adapter {adapter_name!r} has a {module!r} of shape {tuple(found.shape)}, but this model's has "
                f"{tuple(present[key].shape)}. Adapters that share a model need the same num_labels. Load the base "
                "model with the num_labels of this adapter; or, to serve tasks with different numbers of labels "
                "from one model, train all of them with the largest num_labels, or with label words "
                "(peft_prune.make_verbalizer)."
            )


@contextmanager
def taken_back_on_error(model: nn.Module, adapter_name: str) -> Iterator[None]:
    """Delete an adapter that could not be loaded, so that nobody gets answers from what was to be overwritten.

    The first adapter of a model stays, as PEFT wants one, and so does one that was there and trained before.
    """
    try:
        yield
    except Exception:
        if isinstance(model, PeftModel) and _is_new(model, adapter_name):
            model.delete_adapter(adapter_name)
        raise


def _is_new(model: PeftModel, name: str) -> bool:
    """Whether an adapter was added to others just now, and holds nothing yet."""
    if len(model.peft_config) < 2 or name in model.active_adapters:
        return False
    layers = pruning_layers(model, name)
    return not any(layer.steps(name)[0] >= 0 for layer in layers if name in layer.progress)
