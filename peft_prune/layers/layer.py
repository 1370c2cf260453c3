"""The layer that all pruning methods share: a linear layer seen through a mask."""

from __future__ import annotations

from typing import Any, Optional

import torch
from torch import nn

from . import merging
from .by_sample import forward_by_sample
from .final import FinalMasks
from .masks import not_calibrated
from .sharding import NotReplicated
from .watch import look_at_schedule, warn_once


BASE = "__base__"  # PEFT's name for no adapter, in `adapter_names`


class PruningLayer(NotReplicated, FinalMasks):
    """Base of the layers that replace a target module; what they hold is described at [`AdapterTensors`]."""

    def set_adapter(self, adapter_names: str | list[str], inference_mode: bool = False) -> None:
        super().set_adapter(adapter_names, inference_mode=inference_mode)
        for name, host in self.host.items():
            if name not in self.active_adapters:  # what was decoded takes more than its stored form
                host.drop_decoded()
        self.cached_weight.clear()

    # ----------------------------------------------------------------- penalty

    def arm_penalty(self, adapter_name: str, factor: float) -> None:
        """Have the next backward pass add `factor · σ'(S)` to the gradient of the scores."""
        self.penalty_grad[adapter_name].fill_(factor)
        self.host[adapter_name].penalty_armed = True

    def take_penalty(self, adapter_name: str, scores: torch.Tensor) -> Optional[torch.Tensor]:
        """The penalty's factor, once an optimizer step: for the first forward pass that will be differentiated."""
        wanted = self.training and torch.is_grad_enabled() and scores.requires_grad
        if not (wanted and self.host[adapter_name].penalty_armed):
            return None
        self.host[adapter_name].penalty_armed = False
        return self.penalty_grad[adapter_name].clone()

    # ------------------------------------------------------------------ weights

    def changes_weights(self, adapter_name: str) -> bool:
        """Whether an adapter has weights of its own, and not only a mask."""
        return self.host[adapter_name].recipe.update.changes_weights(self, adapter_name)

    def ranking(self, adapter_name: str) -> torch.Tensor:
        """What decides which units stay, the largest first: float, shape (out / rows, in / columns)."""
        return self.host[adapter_name].recipe.importance.rank(self, adapter_name)

    def delta(self, adapter_name: str) -> torch.Tensor:
        """The whole update of an adapter: float32, shape (out, in); 0 without one."""
        return self.host[adapter_name].recipe.update.delta(self, adapter_name)

    def active_names(self) -> list[str]:
        """Active adapters of this layer.

        Raises:
            ValueError: several are active, of which one has weights of its own.
        """
        names = [name for name in self.active_adapters if name in self.host]
        if len(names) > 1 and any(self.changes_weights(name) for name in names):
            raise ValueError(
                f"The adapters {names} are active together, and some of them have weights of their own. Activate one: "
                f"model.set_adapter({names[0]!r})."
            )
        return names

    def effective_weight(self, weight: torch.Tensor) -> torch.Tensor:
        """The masked weight that all active adapters together make of the base weight, in the layout of that.

        Several masks keep what all of them keep. An update beside the mask is added to the output, see `forward`.
        """
        for name in self.active_names():
            if not self.has_mask(name):
                warn_once("calibrate", not_calibrated(self.config(name)))
                continue
            recipe, matrix = self.host[name].recipe, self._as_matrix(weight)
            look_at_schedule(self, name)
            matrix = recipe.update.inside(self, name, matrix)
            stays = recipe.importance.masked if name in self.progress else recipe.importance.settled
            weight = self._as_matrix(stays(self, name, matrix))
        return weight

    def applied(self, name: str, matrix: torch.Tensor, merging: bool = False) -> torch.Tensor:
        """What an adapter makes of a matrix (out, in) in inference, its update included."""
        recipe, result = self.host[name].recipe, self.under_mask(name, matrix)
        outside = recipe.update.outside(self, name, merging)
        return result if outside is None else result + outside.to(matrix.dtype)

    def under_mask(self, name: str, matrix: torch.Tensor) -> torch.Tensor:
        """What an adapter's mask leaves of a matrix (out, in), with what of its update is under the mask."""
        recipe = self.host[name].recipe
        return recipe.importance.settled(self, name, recipe.update.inside(self, name, matrix))

    def adapted(self, name: str, matrix: torch.Tensor) -> torch.Tensor:
        """What an adapter makes of a matrix (out, in) when it is merged."""
        return self.applied(name, matrix, merging=True)

    def _warn_about_hooks(self) -> None:
        base = self.get_base_layer()
        if base._forward_hooks or base._forward_pre_hooks or base._backward_hooks or base._backward_pre_hooks:
            warn_once(
                "hooks",
                "A pruned base layer has forward or backward hooks. They are ignored, because the masked weight is "
                "used without calling the base layer. Register them on the pruned layer instead.",
            )

    def _check_weight(self) -> None:
        self._warn_about_hooks()
        if self.weight.device.type == "meta":
            raise RuntimeError(
                f"The weight of {self.module_name!r} is offloaded (device 'meta'). A mask needs the weight itself: "
                "load the base model without offloading, for instance with another device_map or dtype."
            )

    # ----------------------------------------------------------------- forward

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        adapter_names = kwargs.pop("adapter_names", None)
        if adapter_names is not None and not self.disable_adapters:
            self._check_weight()
            return forward_by_sample(self, x, adapter_names)
        if self.disable_adapters:
            if self.merged:
                self.unmerge()
            return self.base_layer(x, *args, **kwargs)
        if self.merged or not self._get_available_adapters().intersection(self.active_adapters):
            return self.base_layer(x, *args, **kwargs)
        self._check_weight()
        result = self._apply_masked(x)
        for name in self.active_names():
            result = self.host[name].recipe.update.beside(self, name, x, result)
        return result

    def _apply_masked(self, x: torch.Tensor) -> torch.Tensor:
        """What the masked weight makes of an input."""
        if self.training or torch.is_grad_enabled() or not self.cached_weight.enabled:
            return self._apply_weight(x, self.effective_weight(self.weight))
        names = self.active_names()
        sources = [self.weight]
        for name in names:
            sources += self.sources(name)
        weight = self.cached_weight.get(names, sources, lambda: self.effective_weight(self.weight))
        return self._apply_weight(x, weight)

    def train(self, mode: bool = True) -> Any:
        """As for every module; training lets go of the weight that inference had cached."""
        if mode:
            self.cached_weight.clear()
        return super().train(mode)

    # ------------------------------------------------------------------- merge

    def merge(self, safe_merge: bool = False, adapter_names: Optional[list[str]] = None) -> None:
        """Put the effective weight into the base layer; what was there is kept for a bit-exact `unmerge`.

        Args:
            safe_merge (`bool`): check first that the weights that stay are finite.
            adapter_names (`list[str]`, *optional*): adapters to merge, by default the active ones.

        Raises:
            ValueError: `safe_merge` found values that are not finite; nothing was changed then.
        """
        self.cached_weight.clear()
        merging.merge(self, safe_merge, adapter_names)

    def unmerge(self) -> None:
        """Put the weights back, last in first out."""
        merging.unmerge(self)

    def __repr__(self) -> str:
        return self.prefix.removesuffix("_") + "." + super().__repr__()


def pruning_layers(model: nn.Module, adapter_name: Optional[str] = None) -> list[PruningLayer]:
    """All pruning layers of a model, wrapped in whatever it is; only those with the given adapter if one is named."""
    layers = [m for m in model.modules() if isinstance(m, PruningLayer)]
    if adapter_name is not None:
        layers = [layer for layer in layers if adapter_name in layer._get_available_adapters()]
    return layers
