"""Mixtures of experts whose experts are parameters, and not modules on which a mask could be put."""

from __future__ import annotations

import warnings
from typing import Any

from torch import nn

from .targets import IN_BLOCK, base_modules, default_target_modules


_LAYERS = (nn.Linear, nn.Embedding, nn.modules.conv._ConvNd)


def tell_experts(model: nn.Module, config: Any, field: str = "target_modules") -> None:
    """Say that experts stay dense: where targets are named with a warning, else with an error.

    Args:
        model (`nn.Module`): the model to prune.
        config ([`PruningConfig`]): the configuration. Heads, and adapters that are final, concern no experts.
        field (`str`): the field that names what is pruned.

    Raises:
        ValueError: the field is not given or `"all-linear"`, so the whole model is meant.
    """
    if config.finalized or config.granularity == "head":
        return
    experts, share = _experts(model)
    if not experts:
        return
    first = next(iter(experts))
    what = (
        f"the experts of {type(model).__name__}, {100 * share:.1f} % of the weights of its blocks: they are parameters "
        f"({', '.join(experts[first])}) of {first!r} and its like, {len(experts)} in all, and masks are put on modules"
    )
    targets = getattr(config, field)
    if targets is None or (isinstance(targets, str) and targets.lower() == "all-linear"):
        named = sorted(default_target_modules(model))
        raise ValueError(
            f"{field}={targets!r} means the whole model, but this method cannot prune {what}. To prune the "
            f"other layers and leave the experts dense, name those: {field}={named}."
        )
    warnings.warn(f"This adapter does not prune {what}.", UserWarning, stacklevel=2)


def _experts(model: nn.Module) -> tuple[dict[str, list[str]], float]:
    """Modules that hold weights of experts themselves, with the names of these; their share of the blocks' weights."""
    found: dict[str, list[str]] = {}
    of_experts = everything = 0
    for name, module in base_modules(model):
        own = {key: p for key, p in module._parameters.items() if p is not None and p.dim() > 1}
        size = sum(p.numel() for p in own.values())
        if IN_BLOCK.fullmatch(f"{name}.weight"):
            everything += size
            if size and not isinstance(module, _LAYERS) and "expert" in f"{name} {type(module).__name__}".lower():
                found[name] = list(own)
                of_experts += size
    return found, of_experts / max(everything, 1)
