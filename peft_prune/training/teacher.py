"""A model without its adapters as its own teacher: no second copy in memory."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn

from ..peft_api import BaseTunerLayer, ModulesToSaveWrapper


@contextmanager
def as_base(model: nn.Module) -> Iterator[Any]:
    """The base model, in eval mode and without gradients, while the context lasts; then all is as it was.

    Args:
        model (`nn.Module`): any model with adapters, by whatever road they got into it.

    Yields:
        `nn.Module`: the same model, whose adapters have no effect.
    """
    training = {module: module.training for module in model.modules()}
    with ExitStack() as stack:
        for module in training:
            if isinstance(module, (BaseTunerLayer, ModulesToSaveWrapper)) and not module.disable_adapters:
                stack.callback(setattr, module, "_disable_adapters", False)
                module._disable_adapters = True
        try:
            model.eval()
            with torch.no_grad():
                yield model
        finally:
            for module, mode in training.items():
                module.training = mode
