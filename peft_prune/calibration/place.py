"""Where blocks are run."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Optional

import torch
from torch import nn


def device_of(model: nn.Module) -> torch.device:
    """Where the first parameter of a module is; the CPU if it has none."""
    return next((p.device for p in model.parameters()), torch.device("cpu"))


@contextmanager
def moved(block: nn.Module, device: Optional[torch.device | str]) -> Iterator[torch.device]:
    """A block on a device, and back where it was, an interrupt included."""
    home = device_of(block)
    place = home if device is None else torch.device(device)
    try:
        if device is not None:
            block.to(place)
        yield place
    finally:
        if device is not None:
            block.to(home)
