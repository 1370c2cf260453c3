"""Names that an adapter can have, and what is said when one is added that trains nothing."""

from __future__ import annotations

from typing import Any

from torch import nn

from ..layers.layer import pruning_layers
from ..layers.watch import warn_once
from ..peft_api import BufferDict


# what holds the tensors of an adapter under its name, as an attribute
_HOLDERS = (nn.ParameterDict(), nn.ModuleDict(), BufferDict())


def check_adapter_name(name: Any) -> None:
    """Raise `ValueError` if a name cannot be that of an adapter, because torch keeps an adapter's tensors under it."""
    if not isinstance(name, str) or not name or "." in name:
        raise ValueError(f"adapter_name={name!r} must be a non-empty string without dots, such as 'default'.")
    if any(hasattr(holder, name) for holder in _HOLDERS):
        raise ValueError(
            f"adapter_name={name!r} cannot be used: torch's ParameterDict, which holds what an adapter trains, has an "
            f"attribute of that name. Choose another name, such as {name + '_1'!r}."
        )


def warn_if_nothing_trains(model: nn.Module, config: Any, name: str) -> None:
    """Warn if an adapter is loaded with `is_trainable=True`, and is final and holds masks only."""
    if not config.finalized or config.inference_mode:
        return
    layers = pruning_layers(model, name)
    if not any(name in layer.held(kind) for layer in layers for kind in layer.trained_names):
        others = f"Only modules_to_save={config.modules_to_save!r} are trained. " if config.modules_to_save else ""
        warn_once(
            f"nothing trains in {name}",
            f"is_trainable=True has no effect on the masks of adapter {name!r}: they are final, and have no scores "
            f"to train. {others}To train on, load a checkpoint that was saved before peft_prune.finalize.",
        )
