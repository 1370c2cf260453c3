"""Merging somebody else's adapter, such as a LoRA, into a pruned base without filling its zeros."""

from __future__ import annotations

import logging
from typing import Any, cast

import torch
from torch import nn

from ..peft_api import BaseTunerLayer


_logger = logging.getLogger(__name__)


def merge_keeping_zeros(model: nn.Module, **kwargs: Any) -> nn.Module:
    """`merge_and_unload()` of any PEFT adapter, after which weights that were zero in the base are zero again.

    The outputs move by what the adapter had to say at these places; the share of the update that is lost is logged.

    Args:
        model ([`~peft.PeftModel`]): an adapter on a base that is sparse.
        **kwargs: passed on to `merge_and_unload`.

    Returns:
        `nn.Module`: the merged base model, as sparse as it was.

    Raises:
        ValueError: adapters are merged already, so zeros cannot be told any more; or no adapted weight has any.
    """
    layers = [m for m in model.modules() if isinstance(m, BaseTunerLayer) and hasattr(m.get_base_layer(), "weight")]
    if any(layer.merged for layer in layers):
        raise ValueError("merge_keeping_zeros: adapters are merged already. Call model.unmerge_adapter() first.")
    before = [
        (layer.get_base_layer(), cast(torch.Tensor, layer.get_base_layer().weight).detach().clone()) for layer in layers
    ]
    if not any(bool((weight == 0).any()) for _, weight in before):
        raise ValueError("merge_keeping_zeros: no adapted weight of the base is zero. Use merge_and_unload().")
    merged = cast(Any, model).merge_and_unload(**kwargs)
    whole = lost = 0.0
    with torch.no_grad():
        for module, old in before:
            weight, zeros = cast(torch.Tensor, module.weight), old == 0
            whole += float((weight - old).float().square().sum())
            lost += float(weight[zeros].float().square().sum())
            weight[zeros] = 0
    _logger.warning(
        "merge_keeping_zeros removed %.2f%% of the norm of the update.", 100 * (lost / (whole or 1.0)) ** 0.5
    )
    return merged
