"""Where reading a number costs nothing, and where the host would wait for an accelerator."""

from __future__ import annotations

import torch


HOST = "cpu"  # the type of device whose numbers are there at once


def on_cpu(tensor: torch.Tensor) -> bool:
    """Whether a tensor's numbers can be read at once. Elsewhere, code has to do without reading any."""
    return tensor.device.type == HOST
