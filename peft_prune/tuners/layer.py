"""The layer that all pruning methods share: a linear layer seen through a mask."""

from __future__ import annotations

import zlib
from typing import Any, Optional

import torch
from torch import nn

from ..masks.granularity import spread
from ..masks.hard_concrete import draw_noise, hard_concrete
from . import merging
from .distributed import NotReplicated
from .low_rank_scores import LowRankScores
from .masked_weight import MaskedWeight, Penalized
from .mixed_forward import mixed_batch_forward
from .stored_form import StoredForm
from .watch import warn_once


BASE = "__base__"  # PEFT's name for no adapter, in `adapter_names`


class PruningLayer(NotReplicated, StoredForm):
    """Base of the layers that replace a target module; what they hold is described at [`Holdings`]."""

    def delete_adapter(self, adapter_name: str) -> None:
        super().delete_adapter(adapter_name)
        self.penalty_armed.discard(adapter_name)
        self._watch.forget(adapter_name)

    def set_adapter(self, adapter_names: str | list[str], inference_mode: bool = False) -> None:
        super().set_adapter(adapter_names, inference_mode=inference_mode)
        # what was decoded takes more than its stored form: keep those in use only
        self._masks = {name: mask for name, mask in self._masks.items() if name in self.active_adapters}
        self._values = {name: value for name, value in self._values.items() if name in self.active_adapters}
        self.cached_weight.clear()

    # ----------------------------------------------------------------- penalty

    def arm_penalty(self, adapter_name: str, factor: float) -> None:
        """Have the next backward pass add `factor · σ'(S)` to the gradient of the scores."""
        self.penalty_grad[adapter_name].fill_(factor)
        self.penalty_armed.add(adapter_name)

    def _take_penalty(self, adapter_name: str, scores: torch.Tensor) -> Optional[torch.Tensor]:
        """The penalty's factor, once an optimizer step: for the first forward pass that will be differentiated."""
        wanted = self.training and torch.is_grad_enabled() and scores.requires_grad
        if not (wanted and adapter_name in self.penalty_armed):
            return None
        self.penalty_armed.discard(adapter_name)
        return self.penalty_grad[adapter_name].clone()

    # ----------------------------------------------------------------- forward

    @classmethod
    def advance(
        cls, model: nn.Module, name: str, layers: list[Any], step: int, total_steps: int
    ) -> Optional[dict[str, float]]:
        """A method's own step of the schedule; `None` if it is the usual one, see `update_schedule`."""
        return None

    def effective_weight(self, weight: torch.Tensor) -> torch.Tensor:
        """The weight that all active adapters together make of the base weight, in the layout of that.

        Several masks keep what all of them keep.
        """
        names = [name for name in self.active_adapters if name in self.pruning_config]
        if len(names) > 1 and any(self.changes_weights(name) for name in names):
            raise ValueError(
                f"The adapters {names} are active together, and some of them have weights of their own. Activate one: "
                f"model.set_adapter({names[0]!r})."
            )
        for name in names:
            if name in self.progress:
                self._look_at_schedule(name)
                weight = self._as_matrix(self._trained(name, self._as_matrix(weight)))
            elif self.has_mask(name):
                weight = self._as_matrix(self.adapted(name, self._as_matrix(weight)))
            else:
                warn_once("calibrate", self.pruning_config[name].without_mask)
        return weight

    def _look_at_schedule(self, name: str) -> None:
        """Warn if an adapter is trained while nobody advances its schedule."""
        if not self.training or name not in self.progress or torch.compiler.is_compiling():
            return
        watched = [self.held(kind)[name] for kind in self.watched_names if name in self.held(kind)]
        if watched and self.pruning_config[name].init_weights:
            self._watch.look(name, watched[0], self.steps(name)[0])

    def _trained(self, name: str, matrix: torch.Tensor) -> torch.Tensor:
        """What training sees of a matrix (out, in), with gradients for scores and update."""
        matrix = self._updated(name, matrix)
        scores, penalty = self._differentiable_scores(name)
        if scores is None:
            return matrix * self.get_mask(name)
        mask = self.get_mask(name)
        if not self.pruning_config[name].gated:
            return MaskedWeight.apply(scores, matrix, mask, penalty, self.block(name))
        if penalty is not None:
            scores = Penalized.apply(scores, penalty, self.pruning_config[name].penalty_offset)
        return matrix * spread(hard_concrete(scores, self._noise(name)), self.block(name)).to(matrix.dtype)

    def _differentiable_scores(self, name: str) -> tuple[Optional[torch.Tensor], Optional[torch.Tensor]]:
        """What receives the gradient of the scores, and the penalty that is to be added to it."""
        if name in self.scores:
            scores = self.scores[name]
            return scores, self._take_penalty(name, scores)
        if not self.has_scores(name):
            return None, None
        a, b = (self.held(kind)[name] for kind in ("scores_A", "scores_B"))
        return LowRankScores.apply(a, b, self.matrix, self.score_starts[name], self._take_penalty(name, a)), None

    def _noise(self, name: str) -> Optional[torch.Tensor]:
        """Noise of the gates, in training only; the same on all ranks, another for each layer and step."""
        if not self.training:  # without gradients, too: reentrant checkpointing begins so
            return None
        step = self.steps(name)[0]
        seed = zlib.crc32(f"{getattr(self.pruning_config[name], 'seed', 0)}:{step}:{self.module_name}".encode())
        return draw_noise(self.scores[name].shape, self.scores[name].device, seed)

    def adapted(self, name: str, matrix: torch.Tensor) -> torch.Tensor:
        """What an adapter makes of a matrix (out, in) in inference, and when it is merged."""
        if name in self.values:
            return self._kept_values(name).to(matrix.dtype)
        if name in self.progress:
            matrix = self._updated(name, matrix)
            if self.pruning_config[name].gated:
                return matrix * spread(hard_concrete(self.scores[name]), self.block(name)).to(matrix.dtype)
        return matrix * self.get_mask(name)

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

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        adapter_names = kwargs.pop("adapter_names", None)
        if adapter_names is not None and not self.disable_adapters:
            self._check_weight()
            return mixed_batch_forward(self, x, adapter_names)
        if self.disable_adapters:
            if self.merged:
                self.unmerge()
            return self.base_layer(x, *args, **kwargs)
        if self.merged or not self._get_available_adapters().intersection(self.active_adapters):
            return self.base_layer(x, *args, **kwargs)
        self._check_weight()
        return self._apply_adapters(x)

    def _apply_adapters(self, x: torch.Tensor) -> torch.Tensor:
        """What the active adapters together make of an input."""
        if self.training or torch.is_grad_enabled() or not self.cached_weight.enabled:
            return self._apply_weight(x, self.effective_weight(self.weight))
        names = [name for name in self.active_adapters if name in self.pruning_config]
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
