"""The adapter that holds what was found."""

from __future__ import annotations

from typing import Any, Optional

from peft import PeftModel, get_peft_model
from torch import nn

from ..layers.layer import pruning_layers
from ..methods.movement import MovementPruningConfig
from ..tuner.targets import IN_BLOCK
from .look import Found


_CAUSAL = ("ForCausalLM", "LMHeadModel")


def final_config(
    model: nn.Module,
    found: Found,
    modules_to_save: Optional[list[str]],
    value_dtype: Optional[str],
    task_type: Optional[str],
) -> MovementPruningConfig:
    """The recipe of zeros that are there, as it is when it is final."""
    patterns = set(found.patterns.values())
    size = sum(info["shape"][0] * info["shape"][1] for info in found.infos.values())
    causal = type(model).__name__.endswith(_CAUSAL)
    return MovementPruningConfig(
        task_type=task_type or ("CAUSAL_LM" if causal else None),
        target_modules=_spelled(model, list(found.infos)),
        modules_to_save=modules_to_save,
        from_existing_zeros=True,
        update="full" if found.values else "none",
        value_dtype=value_dtype if found.values and value_dtype else "float32",
        granularity=(patterns.pop() if len(patterns) == 1 else None) or "weight",
        sparsity=1.0 - sum(info["kept"] for info in found.infos.values()) / size,
        finalized=True,
        mask_info=found.infos,
        inference_mode=True,
    )


def _spelled(model: nn.Module, modules: list[str]) -> list[str]:
    """Modules by the ends of their names below the number of their block, if no other module has these."""
    matches = [IN_BLOCK.fullmatch(name) for name in modules]
    ends = {match["suffix"] if match else name for match, name in zip(matches, modules, strict=True)}
    reached = {name for name, _ in model.named_modules() if any(name == e or name.endswith("." + e) for e in ends)}
    return sorted(ends if reached == set(modules) else modules)


def make_adapter(model: nn.Module, config: MovementPruningConfig, adapter_name: str, found: Found) -> PeftModel:
    """Put an adapter on the base model. Masks and values are taken out of `found`."""
    made: Any = get_peft_model(model, config, adapter_name)  # type: ignore[arg-type]
    for layer in pruning_layers(made, adapter_name):
        if layer.module_name in found.values:
            values = found.values.pop(layer.module_name)
            layer.held("values")[adapter_name] = values.to(layer.weight.device)
        layer.set_mask(adapter_name, found.masks.pop(layer.module_name))
    return made
