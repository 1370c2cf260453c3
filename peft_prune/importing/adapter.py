"""The adapter that holds what was found."""

from __future__ import annotations

from typing import Any, Optional

from peft import PeftModel, get_peft_model
from torch import nn

from ..config import PruningConfig
from ..layers.layer import pruning_layers
from ..methods.imported import final_config
from ..tuner.targets import IN_BLOCK
from .scan import Found


_CAUSAL = ("ForCausalLM", "LMHeadModel")


def config_of(
    model: nn.Module,
    found: Found,
    modules_to_save: Optional[list[str]],
    value_dtype: Optional[str],
    task_type: Optional[str],
) -> PruningConfig:
    """The config of the adapter that holds what was found."""
    patterns = set(found.patterns.values())
    causal = type(model).__name__.endswith(_CAUSAL)
    return final_config(
        found.infos,
        value_dtype if found.values else None,
        task_type=task_type or ("CAUSAL_LM" if causal else None),
        target_modules=_spelled(model, list(found.infos)),
        modules_to_save=modules_to_save,
        granularity=(patterns.pop() if len(patterns) == 1 else None) or "weight",
    )


def _spelled(model: nn.Module, modules: list[str]) -> list[str]:
    """Modules by the ends of their names below the number of their block, if no other module has these."""
    matches = [IN_BLOCK.fullmatch(name) for name in modules]
    ends = {match["suffix"] if match else name for match, name in zip(matches, modules, strict=True)}
    reached = {name for name, _ in model.named_modules() if any(name == e or name.endswith("." + e) for e in ends)}
    return sorted(ends if reached == set(modules) else modules)


def make_adapter(model: nn.Module, config: PruningConfig, adapter_name: str, found: Found) -> PeftModel:
    """Put an adapter on the base model. Masks and values are taken out of `found`."""
    made: Any = get_peft_model(model, config, adapter_name)  # type: ignore[arg-type]
    for layer in pruning_layers(made, adapter_name):
        if layer.module_name in found.values:
            values = found.values.pop(layer.module_name)
            layer.held("values")[adapter_name] = values.to(layer.weight.device)
        layer.set_mask(adapter_name, found.masks.pop(layer.module_name))
    return made
