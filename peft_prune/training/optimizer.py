"""Optimizer with a learning rate of its own for the scores."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Optional

import torch
from torch import nn
from transformers.trainer_pt_utils import get_parameter_names

from ..layers.layer import PruningLayer
from ..stages.schedule import trained_adapters, why_nothing_trains


def pruning_parameter_groups(
    model: nn.Module, lr: float, score_lr: Optional[float] = None, weight_decay: float = 0.0
) -> list[dict[str, Any]]:
    """Split the trainable parameters: scores and updates (no weight decay), other weights (decay), biases and norms.

    Args:
        model (`nn.Module`): any model that contains pruning layers with trainable scores.
        lr (`float`): learning rate of everything but the scores.
        score_lr (`float`, *optional*): learning rate of the scores, by default the config's `score_lr`.
        weight_decay (`float`): for weights other than scores, biases and norms.

    Raises:
        ValueError: the model has no trainable scores.
    """
    adapters = trained_adapters(model)
    trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
    recipes = [layers[0].host[name].recipe for name, layers in adapters.items()]
    scores = _trained(adapters, sorted({kind for recipe in recipes for kind in recipe.importance.tensors}))
    updates = _trained(adapters, sorted({kind for recipe in recipes for kind in recipe.update.tensors}))
    if not scores and not updates:
        raise ValueError(
            f"There are no scores to train: {why_nothing_trains(model)}"
            if not adapters
            else "The model's scores are frozen. Load the adapter with is_trainable=True."
        )
    if score_lr is None and scores:
        score_lr = next(
            layers[0].config(name).score_lr
            for name, layers in adapters.items()
            if layers[0].host[name].recipe.importance.tensors
        )
    # the names that Trainer exempts from weight decay
    exempt = [r"bias", r"layernorm", r"rmsnorm", r"(?:^|\.)norm(?:$|\.)", r"_norm(?:$|\.)"]
    decayed = set(get_parameter_names(model, [nn.LayerNorm], exempt))
    others = {name: p for name, p in trainable.items() if id(p) not in scores and id(p) not in updates}
    groups: list[dict[str, Any]] = [  # `Trainer` logs the learning rate of the first: the one that it was given
        {"params": [p for n, p in others.items() if n in decayed], "lr": lr, "weight_decay": weight_decay},
        {"params": [p for n, p in others.items() if n not in decayed], "lr": lr, "weight_decay": 0.0},
        # a decay of the update would draw the weights back to the base model
        {"params": list(updates.values()), "lr": lr, "weight_decay": 0.0},
        {"params": list(scores.values()), "lr": score_lr, "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def _trained(adapters: dict[str, list[PruningLayer]], kinds: Sequence[str]) -> dict[int, nn.Parameter]:
    """Trainable parameters of some kinds, such as scores, of some adapters, by identity."""
    layers = [(layer, name) for name, layers in adapters.items() for layer in layers]
    found = (layer.held(kind).get(name) for layer, name in layers for kind in kinds)
    return {id(p): p for p in found if p is not None and p.requires_grad}


def create_pruning_optimizer(
    model: nn.Module,
    lr: float,
    score_lr: Optional[float] = None,
    optimizer_cls: type[torch.optim.Optimizer] = torch.optim.AdamW,
    weight_decay: float = 0.0,
    **kwargs: Any,
) -> torch.optim.Optimizer:
    """Create an optimizer for a plain training loop, as PEFT's `create_loraplus_optimizer`.

    Args:
        model (`nn.Module`): any model that contains pruning layers with trainable scores.
        lr (`float`): learning rate of everything but the scores, for instance the classifier.
        score_lr (`float`, *optional*): learning rate of the scores, by default the config's `score_lr`.
        optimizer_cls (`type`): class of the optimizer.
        weight_decay (`float`): for weights other than scores, biases and norms.
        kwargs: passed on to the optimizer.
    """
    return optimizer_cls(pruning_parameter_groups(model, lr, score_lr, weight_decay), lr=lr, **kwargs)  # type: ignore[call-arg]
