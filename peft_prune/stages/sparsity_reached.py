"""What was asked for and what can be had: only whole units can be removed, and at least one of a matrix stays."""

from __future__ import annotations

import math
import warnings
from typing import Any, Optional

from ..layers.layer import PruningLayer


def sparsity(layers: list[PruningLayer], adapter_name: str) -> float:
    """Share of the weights of some layers that an adapter removes."""
    total = sum(math.prod(layer.shape) for layer in layers)
    return 1.0 - sum(layer.kept(adapter_name) for layer in layers) / total


def _share(name: str, layers: list[PruningLayer], removed: list[float]) -> float:
    """Sparsity of all layers together, from that of each."""
    sizes = [math.prod(layer.shape) for layer in layers]
    return sum(share * size for share, size in zip(removed, sizes, strict=True)) / sum(sizes)


def asked_sparsity(name: str, layers: list[PruningLayer]) -> Optional[float]:
    """Sparsity of all layers together that the config asks for, `None` if the method finds it by itself."""
    if layers[0].host[name].recipe.rule.finds_sparsity:
        return None
    return _share(name, layers, [layer.target_sparsity(name) for layer in layers])


def reachable_sparsity(name: str, layers: list[PruningLayer]) -> float:
    """Sparsity of all layers together when each removes as many whole units as its target says."""
    rule = layers[0].host[name].recipe.rule
    kept = [rule.count(layer, name, 1.0 - layer.target_sparsity(name)) for layer in layers]
    removed = [1.0 - count / math.prod(layer.shape) for layer, count in zip(layers, kept, strict=True)]
    return _share(name, layers, removed)


def differs(one: float, other: float, name: str, layers: list[PruningLayer]) -> bool:
    """Whether two sparsities lie more than a unit apart, and more than rounding each matrix adds up to."""
    unit = max(math.prod(layer.block(name)) for layer in layers)
    total = sum(math.prod(layer.shape) for layer in layers)
    return abs(one - other) * total > unit and abs(one - other) > 2e-3


def unreachable(config: Any) -> str:
    """Why a target cannot be met, and what to do."""
    by_row = getattr(config, "allocation", None) == "row"
    group, fix = ("row", "allocation='local'") if by_row else ("matrix", "a finer granularity")
    return (
        f"granularity={config.granularity!r} removes whole units, and keeps at least one in each {group}, so this is "
        f"the closest sparsity possible. Use {fix}, or ask for what can be reached"
    )


def warn_if_unreachable(name: str, layers: list[PruningLayer]) -> None:
    """Warn before training that a target cannot be met by whole units."""
    if not layers:
        return
    config = layers[0].config(name)
    wanted = asked_sparsity(name, layers)
    if wanted is None or config.finalized or not config.init_weights:
        return
    reachable = reachable_sparsity(name, layers)
    if differs(reachable, wanted, name, layers):
        warnings.warn(
            f"Adapter {name!r} asks for a sparsity of {wanted:.4f} and will end at {reachable:.4f}: "
            f"{unreachable(config)}.",
            UserWarning,
            stacklevel=2,
        )
