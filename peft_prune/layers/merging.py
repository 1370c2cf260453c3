"""Merging masks into the base weight, and taking them out again."""

from __future__ import annotations

import warnings
from typing import Any, Optional, cast

import torch

from ..peft_api import check_adapters_to_merge


@torch.no_grad()
def merge(layer: Any, safe_merge: bool, adapter_names: Optional[list[str]]) -> None:
    """Put the effective weight into the base layer; what was there is kept for a bit-exact [`unmerge`]."""
    names = [name for name in check_adapters_to_merge(layer, adapter_names) if name in layer._get_available_adapters()]
    _check_together(layer, [*layer.merged_adapters, *names])
    for name in names:
        if safe_merge:
            _check_finite(layer, name, *(layer.held(k)[name] for k in layer.trained_names if name in layer.held(k)))
        layer.get_mask(name)  # all before the weight changes, from which some of them follow
    for name in names:
        weight = layer.weight.data
        mask = layer._as_matrix(layer.get_mask(name))
        merged = layer._as_matrix(layer.adapted(name, layer._as_matrix(weight)).to(weight.dtype))
        if safe_merge:
            _check_finite(layer, name, merged, weight)
        # a mask alone changes what it removes, kept values change everything
        changed = torch.ones_like(mask) if layer.changes_weights(name) else ~mask
        layer._stash.append((name, changed, weight[changed]))
        weight.copy_(merged)
        layer.merged_adapters.append(name)


def _check_together(layer: Any, names: list[str]) -> None:
    if len(names) > 1 and any(layer.changes_weights(name) for name in names):
        raise ValueError(
            f"The adapters {names} cannot be merged together, because some of them have weights of their own. Merge "
            f"one: model.merge_adapter([{names[-1]!r}]), after model.unmerge_adapter() if another one is merged."
        )


def _check_finite(layer: Any, name: str, *tensors: torch.Tensor) -> None:
    if not all(bool(torch.isfinite(tensor).all()) for tensor in tensors):
        raise ValueError(
            f"NaNs detected in the merged weights. The adapter {name} seems to be broken, or the base model is: "
            f"values that are not finite found in {layer.module_name!r}."
        )


def unmerge(layer: Any) -> None:
    """Put back what was there, last in first out."""
    if not layer.merged:
        warnings.warn("Already unmerged. Nothing to do.", stacklevel=3)
        return
    while layer._stash:
        name, changed, values = layer._stash.pop()
        weight = cast(torch.Tensor, layer.weight.data)
        weight[changed.to(weight.device)] = values.to(weight)  # the model may have moved
        layer.merged_adapters.remove(name)
