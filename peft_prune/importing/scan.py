"""A look at all matrices: what is stored of each is made at once, so that no second model is held."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Optional

import torch
from transformers.utils.logging import tqdm

from ..layers.layer import PruningLayer
from ..storage.codec import MaskFormatError, describe_values
from ..storage.values import VALUE_DTYPES, encode_values
from .base import layers_of, matrix_of
from .mask_file import MaskFile
from .matrices import Comparison, compare, group_pattern
from .names import Names
from .sources import Weights


@dataclass
class Found:
    """
    What is known of the matrices before the adapter is made, by module name.

    Attributes:
        infos (`dict`): what the config records of each pruned matrix.
        masks, values (`dict[str, torch.Tensor]`): what is stored: uint8, one dimension.
        patterns (`dict`): n:m patterns.
        changed (`dict[str, int]`): kept weights that are not the base's.
        dense (`list[str]`): modules without new zeros, whose weights are the base's.
        unlike (`list[str]`): modules whose kept weights have little in common with the base's.
        rounded (`list[str]`): modules whose weights are the base's up to rounding.
        removed (`int`): weights that are zero, and not in the base.
        zeros_of_base (`int`): zeros of the base.
    """

    infos: dict[str, dict[str, Any]] = field(default_factory=dict)
    masks: dict[str, torch.Tensor] = field(default_factory=dict)
    values: dict[str, torch.Tensor] = field(default_factory=dict)
    patterns: dict[str, Optional[str]] = field(default_factory=dict)
    changed: dict[str, int] = field(default_factory=dict)
    dense: list[str] = field(default_factory=list)
    unlike: list[str] = field(default_factory=list)
    rounded: list[str] = field(default_factory=list)
    removed: int = 0
    zeros_of_base: int = 0


def named_by(source: MaskFile, names: Names) -> dict[str, PruningLayer]:
    """Layers that a mask file has masks for."""
    modules = {name: module for name, module in names.model.named_modules() if name}
    paths = [name for name in modules if names.find(f"{name}.weight") or names.find(name)]
    unknown = sorted(names.stored - names.used)
    if unknown:
        raise MaskFormatError(
            f"{source.label} has a mask for {unknown[0]!r} ({len(unknown)} such masks), which "
            f"{type(names.model).__name__} does not have: it was made for another model."
        )
    return layers_of(names.model, paths)


def look_at(
    layers: dict[str, PruningLayer], source: Weights | MaskFile, names: Names, value_dtype: Optional[str]
) -> Found:
    """Compare each matrix with the base's, and bring masks and values into their stored form.

    Raises:
        ValueError: a matrix is not finite, or has a value that cannot be stored.
        MaskFormatError: a mask file is damaged, or was made for another model.
    """
    found = Found()
    for name, layer, seen in _compared(layers, source, names):
        found.zeros_of_base += int((layer.matrix == 0).sum())
        if seen.rounded:
            found.rounded.append(name)
        if seen.unlike:
            found.unlike.append(name)
        if not seen.removed and seen.values is None:
            found.dense.append(name)
            continue
        found.removed += seen.removed
        found.patterns[name], found.changed[name] = group_pattern(seen.kept), seen.changed
        info, mask = layer.stored_form(seen.kept)
        if seen.values is not None:
            assert value_dtype is not None
            try:
                values = encode_values(seen.values, seen.kept, value_dtype)
            except ValueError as error:
                raise ValueError(f"value_dtype={value_dtype!r}: {name!r} of {source.label}: {error}") from error
            info, found.values[name] = info | {"values": describe_values(values, value_dtype)}, values.cpu()
        found.infos[name], found.masks[name] = info, mask.cpu()
    return found


@torch.no_grad()
def _compared(
    layers: dict[str, PruningLayer], source: Weights | MaskFile, names: Names
) -> Iterator[tuple[str, PruningLayer, Comparison]]:
    for name, layer in tqdm(layers.items(), desc="import: compare matrices", unit="matrix"):
        base = layer.matrix.detach()
        if isinstance(source, MaskFile):
            stored = names.find(f"{name}.weight") or names.require(name)
            kept = matrix_of(layer, source.get(stored, layer.weight.shape)).contiguous()
            yield name, layer, Comparison(kept, int((~kept).sum()))
            continue
        stored = names.require(f"{name}.weight")
        try:
            yield name, layer, compare(base, matrix_of(layer, source.get(stored)))
        except ValueError as error:
            raise ValueError(f"{source.label}, {stored!r}: {error}.") from error


def own_dtype(source: Weights, names: Names, layers: dict[str, PruningLayer]) -> str:
    """Dtype in which all values of the sparse model can be stored: its own if it has one.

    Raises:
        ValueError: a matrix is quantised.
    """
    dtypes = set()
    for name in layers:
        stored = names.require(f"{name}.weight")
        dtype = source.dtype(stored)
        if dtype is None:
            raise ValueError(
                f"{source.label}: {stored!r} is quantised, or has a dtype that is not supported. Load it with "
                "Transformers, dequantise it, and pass the model as sparse_model."
            )
        dtypes.add(str(dtype).removeprefix("torch."))
    spelled = dtypes.pop() if len(dtypes) == 1 else "float32"
    return spelled if spelled in VALUE_DTYPES else "float32"


def check_sparse(found: Found, label: str) -> None:
    """Raise `ValueError` if there is nothing to import: no new zeros, or nothing else."""
    if not found.infos:
        raise ValueError(
            f"{label}: every matrix that could be pruned equals the base's, {found.zeros_of_base:,} zeros included. "
            "Either it is not sparse, or base is the sparse model instead of the dense one. To continue training a "
            "sparse model, use MovementPruningConfig(from_existing_zeros=True)."
        )
    if not found.removed:
        raise ValueError(
            f"{label}: it has no zeros that the base does not have, so there is nothing to mask. Check that this is "
            "the sparse model, and base the dense one."
        )
    if not any(info["kept"] for info in found.infos.values()):
        raise ValueError(f"{label}: all matrices are zero. It is damaged, or was not loaded.")
