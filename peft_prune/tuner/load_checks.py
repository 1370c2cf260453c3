"""What is checked when an adapter is loaded: is it whole, and is this the base model that it was made for?"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Optional

import torch

from ..config import PruningConfig
from ..layers.layer import PruningLayer
from ..layers.watch import warn_once
from ..storage.codec import MaskFormatError, check_stored, check_values
from ..storage.fingerprint import agrees


def check_targets(info: Mapping[str, Mapping[str, Any]], targets: Mapping[str, PruningLayer]) -> None:
    """Compare modules and shapes with those that masks were made for.

    Args:
        info: the config's `mask_info`.
        targets: the layers by module name.

    Raises:
        MaskFormatError: a module has no mask, a mask no module, or a shape differs.
    """
    missing = sorted(set(targets) - set(info)) or sorted(set(info) - set(targets))
    if missing:
        where = "has no mask for" if missing[0] in targets else "has a mask for the absent module"
        raise MaskFormatError(
            f"The adapter {where} {missing[0]!r} ({len(missing)} such modules): it was made for another base model"
            f"{_other_class(sorted(info), sorted(targets))}."
        )
    for name, layer in targets.items():
        if list(layer.shape) != list(info[name]["shape"]):
            raise MaskFormatError(
                f"{name!r} is {layer.shape} in this model, but the adapter's mask is for "
                f"{tuple(info[name]['shape'])}: it was made for another base model."
            )


def _other_class(stored: list[str], present: list[str]) -> str:
    """What to say if names differ by what they begin with only: that is another class of the same model."""
    if not stored or not present:
        return ""
    for one, other, has in ((stored[0], present[0], "the adapter's"), (present[0], stored[0], "this model's")):
        if one != other and one.endswith("." + other):
            return (
                f", or another class of the same one: {has} modules begin with {one.removesuffix(other)!r}. Load the "
                "class that it was trained with, such as AutoModelForSequenceClassification"
            )
    return ""


def check_has_zeros(targets: Mapping[str, PruningLayer]) -> None:
    """Raise `ValueError` if none of the matrices whose zeros are to stay has any; what is not loaded yet may have."""
    weights = [layer.matrix for layer in targets.values()]
    if not any(weight.is_meta or bool((weight == 0).any()) for weight in weights):
        raise ValueError(
            f"from_existing_zeros=True, but none of the {len(weights)} target matrices has a zero, so nothing would be "
            "pruned. Load the sparse checkpoint, or give `sparsity` to prune this one."
        )


def check_finite(targets: Mapping[str, PruningLayer]) -> None:
    """Raise `ValueError` if a base weight holds NaN or infinity, which no score would survive.

    Weights that are quantised, merged, split among processes or not loaded yet are left out. A device is waited for
    once.
    """
    checked: dict[torch.device, list[tuple[str, torch.Tensor]]] = {}
    for name, layer in targets.items():
        if layer.quantized or layer.merged:
            continue
        weight = layer.weight
        if weight.is_meta or hasattr(weight, "full_tensor") or not weight.numel():
            continue
        # smallest and largest are NaN if any weight is, and take no memory
        ends = torch.stack(torch.aminmax(weight.detach()))
        checked.setdefault(weight.device, []).append((name, ends.isfinite().all()))
    for entries in checked.values():
        finite = torch.stack([found for _, found in entries]).tolist()
        broken = [name for (name, _), good in zip(entries, finite, strict=True) if not good]
        if broken:
            raise ValueError(
                f"The base weight of {broken[0]!r} ({len(broken)} such modules) holds NaN or infinity, so it cannot be "
                "pruned. The base model was damaged before: load it again, in bfloat16 or float32 if float16 "
                "overflowed, or name the module in `exclude_modules`."
            )


def check_stored_state(
    stored: Mapping[str, torch.Tensor],
    layers: Mapping[str, PruningLayer],
    config: PruningConfig,
    prefix: str,
    adapter_name: str,
) -> None:
    """Compare tensors that were read with what the adapter's layers expect.

    Args:
        stored: tensors by the model's own keys, adapter name included.
        layers: all pruning layers by their name in the model.
        config ([`PruningConfig`]): the adapter's configuration.
        prefix (`str`): the method's prefix.
        adapter_name (`str`): name of the adapter.

    Raises:
        MaskFormatError: a tensor is missing, superfluous, damaged, or of another shape.
    """
    expected = set()
    for name, layer in layers.items():
        if adapter_name not in layer._get_available_adapters():
            continue
        for kind in (*layer.trained_names, *layer.stored_names):
            key = f"{name}.{prefix}{kind}.{adapter_name}"
            holder = layer.held(kind)
            if adapter_name in holder and not (key not in stored and layer.can_find(adapter_name, kind)):
                expected.add(key)
                _check_tensor(layer, kind, holder[adapter_name], stored.get(key), config)
                layer.host[adapter_name].recipe.update.check_stored(layer, adapter_name, kind, stored[key])
    extra = sorted(key for key in stored if f".{prefix}" in key and key not in expected)
    if extra:
        raise MaskFormatError(
            f"The adapter file holds {extra[0]!r} ({len(extra)} such tensors), which adapter_config.json does not "
            "know: it is not the file that belongs to it, or was altered."
        )


def _check_tensor(
    layer: PruningLayer, kind: str, place: torch.Tensor, found: Optional[torch.Tensor], config: PruningConfig
) -> None:
    if found is None:
        state = "Masks are final in" if config.finalized else "Scores are still trained according to"
        raise MaskFormatError(
            f"The adapter file holds no {kind} for {layer.module_name!r}. {state} adapter_config.json: the file is "
            "damaged, or is not the one that belongs to it."
        )
    if config.finalized and kind in ("mask", "values"):
        info = (config.mask_info or {})[layer.module_name]
        if kind == "values":
            check_values(layer.module_name, found, info["values"])
        else:
            check_stored(layer.module_name, found, info)
    elif tuple(found.shape) != tuple(place.shape):
        raise MaskFormatError(
            f"The {kind} of {layer.module_name!r} are {tuple(found.shape)} in the file but {tuple(place.shape)} in "
            "this model: the adapter was made for another model."
        )


def check_base_weights(info: Mapping[str, Mapping[str, Any]], targets: Mapping[str, PruningLayer]) -> None:
    """Compare samples of the base weights with those taken when the masks became final.

    Args:
        info: the config's `mask_info`.
        targets: the layers by module name.

    Raises:
        MaskFormatError: a weight is another one; the message names the first such matrix, and how to load the mask all
            the same.
    """
    unknown = []
    for name, layer in targets.items():
        stored = info[name].get("weights")
        # none in a file of version 1, or if it was quantised; a merged layer shows the pruned weight
        untold = stored is None or layer.merged or layer.quantized
        same = None if untold else agrees(layer.matrix, str(stored))
        if same is None:
            unknown.append(name)
        elif not same:
            raise MaskFormatError(
                f"The weights of {name!r} are not those that the adapter's mask was made for: this is another base "
                "model, or another revision or fine-tuned copy of it. Load the base model that adapter_config.json "
                "names. To use the mask on this one anyway: config = PeftConfig.from_pretrained(...); "
                "config.check_base = False; PeftModel.from_pretrained(model, ..., config=config)."
            )
    if unknown:
        warn_once(
            "base",
            f"Whether the base model is the one that the masks were made for cannot be checked for {len(unknown)} "
            f"modules (for instance {unknown[0]!r}): their weights are merged, quantised or offloaded, "
            "or the adapter has no samples of them because they were when it was made.",
        )
