"""Optimizer with a learning rate of its own for the scores."""

from __future__ import annotations

import inspect
import warnings
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

    Returns:
        `list[dict]`: groups; that of the scores has `betas` of its own if the config has `score_betas`.

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
    hosts = [layers[0].host[name] for name, layers in adapters.items()]
    config = next((host.config for host in hosts if host.recipe.importance.tensors), None)
    if score_lr is None and scores and config is not None:
        score_lr = config.score_lr
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
    if config is not None and config.score_betas is not None:
        groups[-1]["betas"] = tuple(config.score_betas)
    return [group for group in groups if group["params"]]


def _trained(adapters: dict[str, list[PruningLayer]], kinds: Sequence[str]) -> dict[int, nn.Parameter]:
    """Trainable parameters of some kinds, such as scores, of some adapters, by identity."""
    layers = [(layer, name) for name, layers in adapters.items() for layer in layers]
    found = (layer.held(kind).get(name) for layer, name in layers for kind in kinds)
    return {id(p): p for p in found if p is not None and p.requires_grad}


def make_optimizer(
    optimizer_cls: type[torch.optim.Optimizer], groups: list[dict[str, Any]], **kwargs: Any
) -> torch.optim.Optimizer:
    """Make an optimizer of groups; betas of the scores are for optimizers that have such, and otherwise ignored.

    Args:
        optimizer_cls (`type`): class of the optimizer.
        groups (`list[dict]`): of [`pruning_parameter_groups`].
        kwargs: passed on to the optimizer.
    """
    if "betas" not in inspect.signature(optimizer_cls).parameters:
        if any("betas" in group for group in groups):
            warnings.warn(
                f"score_betas has no effect: {optimizer_cls.__name__} has no betas. Use Adam or AdamW.",
                UserWarning,
                stacklevel=3,
            )
        groups = [{key: value for key, value in group.items() if key != "betas"} for group in groups]
    return optimizer_cls(groups, **kwargs)


def create_pruning_optimizer(
    model: nn.Module,
    lr: float,
    score_lr: Optional[float] = None,
    optimizer_cls: type[torch.optim.Optimizer] = torch.optim.AdamW,
    weight_decay: float = 0.0,
    **kwargs: Any,
) -> torch.optim.Optimizer:
    """Create an optimizer for a custom training loop, like PEFT's `create_loraplus_optimizer`.

    Args:
        model (`nn.Module`): any model that contains pruning layers with trainable scores.
        lr (`float`): learning rate of everything but the scores, for instance the classifier.
        score_lr (`float`, *optional*): learning rate of the scores, by default the config's `score_lr`. Their betas are
            the config's `score_betas`, if set.
        optimizer_cls (`type`): class of the optimizer.
        weight_decay (`float`): for weights other than scores, biases and norms.
        kwargs: passed on to the optimizer.
    """
    return make_optimizer(optimizer_cls, pruning_parameter_groups(model, lr, score_lr, weight_decay), lr=lr, **kwargs)
