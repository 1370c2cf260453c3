"""Merging adapters and handing back the base model, whatever of PEFT's tuners is asked to."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Optional, cast

from torch import nn

from ..layers.layer import PruningLayer, pruning_layers
from ..layers.watch import warn_once
from ..peft_api import BaseTuner, BaseTunerLayer, replace_method
from ..structure.shrink import shrink as shrink_model
from ..structure.sites import find_sites
from .refusals import check_no_weight_is_shared


_NOTHING_TO_SHRINK = (
    "merge_and_unload(shrink=True) removed nothing: each head and neuron still has weights, as is usual with masks "
    "of single weights. The model keeps its size. To remove whole heads and neurons, prune with granularity='head', "
    "'column' or 'row', or by P-pruning (PPruningConfig)."
)


@contextmanager
def active_for_merge(tuner: Any, adapter_names: Optional[Sequence[str]]) -> Iterator[list[str]]:
    """Activate the one adapter that is merged, so that its `modules_to_save` come along; gives the names to merge.

    An error inside leaves the adapters active that were.

    Raises:
        ValueError: an adapter is not loaded.
    """
    before = tuner.active_adapter
    names = list(tuner.active_adapters if adapter_names is None else adapter_names)
    unknown = [name for name in names if name not in tuner.peft_config]
    if unknown:
        raise ValueError(f"adapter_names: {unknown[0]!r} is not loaded. Loaded are {sorted(tuner.peft_config)}.")
    changes = len(names) == 1 and names != tuner.active_adapters
    if changes:
        tuner.set_adapter(names[0])
    try:
        yield names
    except BaseException:
        if changes:
            tuner.set_adapter(before)
        raise


def merge_and_shrink(tuner: Any, merge: Any, names: list[str], shrink: Optional[bool]) -> nn.Module:
    """Merge, and take out heads and neurons that are gone if that is asked for or to be expected of the method."""
    asked = bool(shrink)
    if shrink is None:
        shrink = any(tuner.peft_config[name].recipe().rule.structured for name in names) and _has_anatomy(tuner.model)
    if not shrink:
        return merge()
    units = sum(site.units for site in find_sites(tuner.model))  # tells what it does not know before it merges
    model = shrink_model(merge())
    if asked and sum(site.units for site in find_sites(model)) == units:
        warn_once("nothing to shrink", _NOTHING_TO_SHRINK)
    return model


def _has_anatomy(model: nn.Module) -> bool:
    try:
        find_sites(model)
    except ValueError as error:
        warn_once("anatomy", f"The merged model keeps its zeros and is not made smaller. {error}")
        return False
    return True


# ------------------------------------------------- somebody else's adapter on top of ours


@contextmanager
def _masks_go_first(tuner: Any, layers: list[PruningLayer], safe_merge: bool) -> Iterator[None]:
    """Merge masks before the adapter that lies on them, and leave them alone while that is merged.

    What is on top adds to the base weight itself: merged after it, a mask would remove a part of that, too.
    """
    check_no_weight_is_shared(tuner.model, layers)
    waiting = {layer: [n for n in layer.active_adapters if n in layer._get_available_adapters()] for layer in layers}
    waiting = {layer: [n for n in names if n not in layer.merged_adapters] for layer, names in waiting.items()}
    for module in tuner.model.modules():
        inner: Any = getattr(module, "base_layer", None)
        if isinstance(module, BaseTunerLayer) and module.merged and waiting.get(inner):
            raise ValueError(
                f"{inner.module_name!r} has a mask, {waiting[inner]}, that is not merged, below adapters that are: "
                f"{module.merged_adapters}. Call model.unmerge_adapter() first."
            )
    done: list[PruningLayer] = []
    try:
        for layer, names in waiting.items():
            if names:
                layer.merge(safe_merge=safe_merge, adapter_names=names)
                done.append(layer)
    except BaseException:
        for layer in done:
            layer.unmerge()
        raise
    for layer in layers:
        cast(Any, layer).merge = lambda *args, **kwargs: None
    try:
        yield
    finally:
        for layer in layers:
            layer.__dict__.pop("merge", None)


def merge_masks_below_other_adapters() -> None:
    """Have PEFT's own tuners, such as LoRA's, merge masks that they find in the base model; the second call is void.

    Transformers' `model.load_adapter` puts a mask into a base model, on which `get_peft_model` can put a LoRA. PEFT
    would merge the LoRA first and the mask after it, or unload the LoRA together with the mask below.
    """
    replace_method(BaseTuner, "merge_adapter", _merging_below)
    replace_method(BaseTuner, "_unload_and_optionally_merge", _unloading_below)


def _merging_below(original: Any) -> Any:
    def merge_adapter(self: Any, adapter_names: Optional[list[str]] = None, safe_merge: bool = False) -> None:
        layers = _below(self)
        if not layers:
            return original(self, adapter_names=adapter_names, safe_merge=safe_merge)
        self._check_merge_allowed()
        with _masks_go_first(self, layers, safe_merge):
            return original(self, adapter_names=adapter_names, safe_merge=safe_merge)

    return merge_adapter


def _unloading_below(original: Any) -> Any:
    def unload(
        self: Any,
        merge: bool = True,
        progressbar: bool = False,
        safe_merge: bool = False,
        adapter_names: Optional[list[str]] = None,
    ) -> Any:
        layers = _below(self) if merge else []
        if not layers:
            return original(self, merge, progressbar, safe_merge, adapter_names)
        with _masks_go_first(self, layers, safe_merge):
            return original(self, merge, progressbar, safe_merge, adapter_names)

    return unload


def _below(tuner: Any) -> list[PruningLayer]:
    """Pruning layers in the model of a tuner that is not ours."""
    own = issubclass(getattr(tuner, "tuner_layer_cls", object), PruningLayer)
    return [] if own else pruning_layers(tuner.model)
