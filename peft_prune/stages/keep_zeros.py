"""Merging somebody else's adapter, such as a LoRA, into a pruned base without filling its zeros."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
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
        ValueError: adapters are merged already, so zeros cannot be told any more; no adapted weight has any; or a
            layer is merged in a way of its own. Nothing is merged then.
    """
    layers = [m for m in model.modules() if isinstance(m, BaseTunerLayer) and hasattr(m.get_base_layer(), "weight")]
    if any(layer.merged for layer in layers):
        raise ValueError("merge_keeping_zeros: adapters are merged already. Call model.unmerge_adapter() first.")
    if not any(bool((_weight(layer) == 0).any()) for layer in layers):
        raise ValueError("merge_keeping_zeros: no adapted weight of the base is zero. Use merge_and_unload().")
    own_way = [type(layer).__name__ for layer in layers if hasattr(layer, "unload_and_optionally_merge_module")]
    if own_way:  # before anything is merged: what they do cannot be undone
        raise ValueError(
            f"merge_keeping_zeros: {len(own_way)} of {len(layers)} adapted layers, such as {own_way[0]}, are merged in "
            "a way of their own, which may fill zeros. Merge this kind of adapter with merge_and_unload()."
        )
    squares = _Squares()
    for layer in layers:
        cast(Any, layer).merge = partial(_merge_one, layer, layer.merge, squares)
    try:
        merged = cast(Any, model).merge_and_unload(**kwargs)
    finally:
        for layer in layers:
            layer.__dict__.pop("merge", None)
    _logger.warning(
        "merge_keeping_zeros removed %.2f%% of the norm of the update.",
        100 * (squares.lost / (squares.whole or 1.0)) ** 0.5,
    )
    return merged


@dataclass
class _Squares:
    """Squared norms of the updates of some layers, and of what of them was lost."""

    whole: float = 0.0
    lost: float = 0.0


def _weight(layer: Any) -> torch.Tensor:
    return layer.get_base_layer().weight.detach()


@torch.no_grad()
def _merge_one(layer: Any, merge: Callable[..., None], squares: _Squares, *args: Any, **kwargs: Any) -> None:
    """Merge a layer, so that of one weight at a time there is a copy."""
    old = _weight(layer).clone()
    merge(*args, **kwargs)
    weight, zeros = _weight(layer), old == 0
    squares.whole += float((weight - old).float().square().sum())
    squares.lost += float(weight[zeros].float().square().sum())
    weight[zeros] = 0
