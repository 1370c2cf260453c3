"""The layer that all pruning methods share: a linear layer seen through a mask."""

from __future__ import annotations

import warnings
from abc import abstractmethod
from typing import Any, Optional

import torch
from peft.tuners._buffer_dict import BufferDict
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge
from peft.utils.other import get_pattern_key
from torch import nn

from ..config import PruningConfig
from ..masks.codec import describe_mask, encode_mask, load_mask, mask_to_blocks, stored_size
from ..masks.fingerprint import fingerprint
from ..masks.granularity import parse_granularity
from ..masks.importance import initial_scores
from .masked_weight import MaskedWeight
from .watch import ScheduleWatch, warn_once


BASE = "__base__"  # PEFT's name for no adapter, in `adapter_names`


class PruningLayer(nn.Module, BaseTunerLayer):
    """Base of the layers that replace a target module.

    Of each adapter a layer holds either `scores` (float, trained, shape (out, in)) with `progress` (int64: optimizer
    step, total steps, number of weights kept), or, once final, `mask` (uint8, entropy coded). All are named with
    the method's prefix, `smp_scores` and so on, as PEFT and Transformers want it. Scores and masks are (out, in)
    whatever the layout of the base weight.

    Args:
        base_layer (`nn.Module`): the module to prune.
        prefix (`str`): the method's prefix, such as `"smp_"`.
        module_name (`str`): name of the module in the base model.
    """

    def __init__(self, base_layer: nn.Module, prefix: str, module_name: str) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.prefix = prefix
        self.module_name = module_name
        self.adapter_layer_names = (prefix + "scores",)
        self.other_param_names = (
            prefix + "mask",
            prefix + "progress",
            "pruning_config",
            "penalty_grad",
            "_masks",
        )
        setattr(self, prefix + "scores", nn.ParameterDict())
        setattr(self, prefix + "mask", BufferDict(persistent=True))
        setattr(self, prefix + "progress", BufferDict(persistent=True))
        # 0-dim factor of σ'(S); armed for one backward pass each optimizer step
        self.penalty_grad = BufferDict(persistent=False)
        self.penalty_armed: set[str] = set()
        self.pruning_config: dict[str, PruningConfig] = {}
        # per adapter: what the mask was computed from, the versions of that, the mask
        self._masks: dict[str, tuple[tuple[torch.Tensor, ...], list[int], torch.Tensor]] = {}
        self._stash: list[tuple[str, torch.Tensor, torch.Tensor]] = []
        self._disable_adapters = False
        self.merged_adapters: list[str] = []
        self._watch = ScheduleWatch()
        # True while a callback advances the schedule and finalizes at the end
        self.schedule_is_managed = False

    @property
    def scores(self) -> nn.ParameterDict:
        """Scores by adapter name: float, shape (out, in)."""
        return getattr(self, self.prefix + "scores")

    @property
    def mask(self) -> BufferDict:
        """Final masks by adapter name in their stored form: uint8, one dimension."""
        return getattr(self, self.prefix + "mask")

    @property
    def progress(self) -> BufferDict:
        """Step (-1 before the first update), total steps, weights kept, by adapter name: int64, shape (3,)."""
        return getattr(self, self.prefix + "progress")

    @property
    def matrix(self) -> torch.Tensor:
        """The base weight as (out, in)."""
        return self._as_matrix(self.weight)

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in) of the pruned matrix."""
        out_features, in_features = self.matrix.shape
        return int(out_features), int(in_features)

    def _as_matrix(self, tensor: torch.Tensor) -> torch.Tensor:
        """View a tensor of the base weight's layout as (out, in), or back."""
        return tensor

    def _get_available_adapters(self) -> set[str]:
        return set(self.pruning_config)

    # ------------------------------------------------------------------ set-up

    def update_layer(self, adapter_name: str, config: PruningConfig, inference_mode: bool = False) -> None:
        """Add an adapter: trainable scores, or room for the final mask when the config says that it is final."""
        self.pruning_config[adapter_name] = config
        weight = self.weight
        if config.finalized:
            size = stored_size((config.mask_info or {})[self.module_name])
            self.mask[adapter_name] = torch.zeros(size, dtype=torch.uint8, device=weight.device)
        elif config.learns_scores:
            kind = config.score_init if config.init_weights else "random"
            if self.merged and kind == "magnitude":
                raise ValueError(
                    f"score_init='magnitude' needs the weight of {self.module_name!r}, into which "
                    f"{self.merged_adapters} are merged. Call model.unmerge_adapter() first."
                )
            self.scores[adapter_name] = nn.Parameter(initial_scores(self._as_matrix(weight), kind))
            sparsity = config.initial_sparsity if config.init_weights else self.target_sparsity(adapter_name)
            kept = parse_granularity(config.granularity).count(1.0 - sparsity, self.shape)
            self.progress[adapter_name] = torch.tensor([-1, 0, kept], dtype=torch.int64, device=weight.device)
            self.penalty_grad[adapter_name] = torch.zeros((), dtype=torch.float32, device=weight.device)
        self._move_adapter_to_device_of_base_layer(adapter_name)
        self.set_adapter(self.active_adapters, inference_mode=inference_mode)

    def own_sparsity(self, adapter_name: str) -> Optional[float]:
        """What `sparsity_pattern` says of this module, `None` if nothing."""
        pattern = self.pruning_config[adapter_name].sparsity_pattern or {}
        return pattern.get(get_pattern_key(list(pattern), self.module_name))

    def target_sparsity(self, adapter_name: str) -> float:
        """Final sparsity of this module: its own if it has one, otherwise the config's."""
        own = self.own_sparsity(adapter_name)
        sparsity = own if own is not None else self.pruning_config[adapter_name].sparsity
        assert sparsity is not None  # resolved by the config
        return sparsity

    # ------------------------------------------------------------------- masks

    def kept(self, adapter_name: str) -> int:
        """Number of weights that the adapter keeps at present."""
        if adapter_name in self.mask:
            return int(self.pruning_config[adapter_name].mask_info[self.module_name]["kept"])  # type: ignore[index]
        if adapter_name not in self.progress:  # not calibrated yet
            return self.shape[0] * self.shape[1]
        return int(self.progress[adapter_name][2])

    def set_kept(self, adapter_name: str, kept: int, step: int, total_steps: int) -> None:
        """Set how many weights the adapter keeps from here on."""
        self.progress[adapter_name].copy_(torch.tensor([step, total_steps, kept]))

    def get_mask(self, adapter_name: str) -> torch.Tensor:
        """Mask in force: bool, shape (out, in). Computed anew only when scores, progress or the stored mask changed."""
        if torch.compiler.is_compiling() and adapter_name in self._masks:
            # `update_schedule` has computed it: nothing here to trace, and tensor versions cannot be
            return self._masks[adapter_name][2]
        return self._current_mask(adapter_name)

    @torch.compiler.disable
    def _current_mask(self, adapter_name: str) -> torch.Tensor:
        final = adapter_name in self.mask
        if not final and adapter_name not in self.scores:
            raise ValueError(self.pruning_config[adapter_name].without_mask)
        sources = (self.mask[adapter_name],) if final else (self.scores[adapter_name], self.progress[adapter_name])
        versions = [t._version for t in sources]
        cached = self._masks.get(adapter_name)
        if cached is not None and cached[1] == versions:
            # held by the cache, so an identity cannot be somebody else's
            if all(old is new for old, new in zip(cached[0], sources, strict=True)):
                return cached[2]
        config = self.pruning_config[adapter_name]
        if final:
            info = (config.mask_info or {})[self.module_name]
            mask = load_mask(self.module_name, self.mask[adapter_name], info, config.mask_format)
        else:
            granularity = parse_granularity(config.granularity)
            mask = granularity.mask(self.scores[adapter_name], self.kept(adapter_name))
        self._masks[adapter_name] = (sources, versions, mask)
        return mask

    def mask_block(self, adapter_name: str) -> Optional[tuple[int, int]]:
        """Rows and columns of the blocks that the final mask is stored in, `None` for single weights."""
        info = (self.pruning_config[adapter_name].mask_info or {})[self.module_name]
        return tuple(info["block"]) if "block" in info else None

    def finalize(self, adapter_name: str) -> dict[str, Any]:
        """Replace scores by their mask in its stored form, and return what the config records of it."""
        info = self.set_mask(adapter_name, self.get_mask(adapter_name))
        for name in (self.prefix + "scores", self.prefix + "progress", "penalty_grad"):
            del getattr(self, name)[adapter_name]
        return info

    def set_mask(
        self, adapter_name: str, mask: torch.Tensor, block: Optional[tuple[int, int]] = None
    ) -> dict[str, Any]:
        """Give an adapter its final mask, and return what the config records of it.

        Args:
            adapter_name (`str`): the adapter.
            mask (`torch.Tensor`): bool, shape (out, in).
            block (`tuple[int, int]`, *optional*): rows and columns of the blocks that the mask keeps or removes whole.
        """
        if self.merged:
            raise ValueError(f"{self.module_name!r} is merged. Call model.unmerge_adapter() before its mask is set.")
        info, stored = self.stored_form(mask, block)
        self._masks.pop(adapter_name, None)
        self.mask[adapter_name] = stored.to(self.weight.device)
        return info

    def stored_form(
        self, mask: torch.Tensor, block: Optional[tuple[int, int]] = None
    ) -> tuple[dict[str, Any], torch.Tensor]:
        """What the config records of a mask of this layer, and the bytes that are stored."""
        stored = encode_mask(mask if block is None else mask_to_blocks(mask, block))
        return describe_mask(stored, mask, block) | {"weights": fingerprint(self.matrix)}, stored

    def delete_adapter(self, adapter_name: str) -> None:
        super().delete_adapter(adapter_name)
        self.penalty_armed.discard(adapter_name)
        self._watch.forget(adapter_name)

    def set_adapter(self, adapter_names: str | list[str], inference_mode: bool = False) -> None:
        super().set_adapter(adapter_names, inference_mode=inference_mode)
        # an unpacked mask is eight times its stored form: keep those in use only
        self._masks = {name: mask for name, mask in self._masks.items() if name in self.active_adapters}

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

    def effective_weight(self, weight: torch.Tensor) -> torch.Tensor:
        """`W ⊙ M` for all active adapters, in the base weight's layout; several masks keep what all of them keep."""
        for name in self.active_adapters:
            if name in self.scores:
                scores = self.scores[name]
                if self.training and self.pruning_config[name].init_weights:
                    self._watch.look(name, scores, self.progress[name])
                mask, penalty = self.get_mask(name), self._take_penalty(name, scores)
                weight = self._as_matrix(MaskedWeight.apply(scores, self._as_matrix(weight), mask, penalty))
            elif name in self.mask:
                weight = weight * self._as_matrix(self.get_mask(name))
            elif name in self.pruning_config:
                warn_once("calibrate", self.pruning_config[name].without_mask)
        return weight

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

    def _mixed_batch_forward(self, x: torch.Tensor, adapter_names: list[str]) -> torch.Tensor:
        """Each sample of a batch through a mask of its own."""
        if self.merged:
            raise ValueError("adapter_names cannot be used while adapters are merged. Call model.unmerge_adapter().")
        times, rest = divmod(len(x), len(adapter_names))
        if rest:
            raise ValueError(f"adapter_names has {len(adapter_names)} entries, but the batch has {len(x)} samples.")
        # beams, and models that flatten batch and tokens, show a layer several rows of each sample side by side
        names = [name for name in adapter_names for _ in range(times)]
        result: Optional[torch.Tensor] = None
        for name in dict.fromkeys(adapter_names):
            weight = self.weight
            if name in self.scores or name in self.mask:
                weight = weight * self._as_matrix(self.get_mask(name))
            rows = torch.tensor([i for i, other in enumerate(names) if other == name], device=x.device)
            part = self._apply_weight(x[rows], weight)
            if result is None:
                result = part.new_empty((len(x), *part.shape[1:]))
            result[rows] = part
        assert result is not None
        return result

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        adapter_names = kwargs.pop("adapter_names", None)
        if adapter_names is not None and not self.disable_adapters:
            self._check_weight()
            return self._mixed_batch_forward(x, adapter_names)
        if self.disable_adapters:
            if self.merged:
                self.unmerge()
            return self.base_layer(x, *args, **kwargs)
        if self.merged or not self._get_available_adapters().intersection(self.active_adapters):
            return self.base_layer(x, *args, **kwargs)
        self._check_weight()
        return self._apply_weight(x, self.effective_weight(self.weight))

    @abstractmethod
    def _apply_weight(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """What the base layer computes of its input, with another weight in its own layout."""

    # ------------------------------------------------------------------- merge

    def merge(self, safe_merge: bool = False, adapter_names: Optional[list[str]] = None) -> None:
        """Set the pruned weights to zero in the base layer; what was there is kept for a bit-exact `unmerge`.

        Args:
            safe_merge (`bool`): check first that the weights that stay are finite.
            adapter_names (`list[str]`, *optional*): adapters to merge, by default the active ones.

        Raises:
            ValueError: `safe_merge` found values that are not finite; nothing was changed then.
        """
        for name in check_adapters_to_merge(self, adapter_names):
            if name not in self._get_available_adapters():
                continue
            weight = self.weight.data
            removed = ~self._as_matrix(self.get_mask(name))
            if safe_merge and not bool(torch.isfinite(weight).all()):
                raise ValueError(
                    f"Weights that are not finite found in {self.module_name!r} while merging adapter {name!r}. The "
                    "base model seems to be broken."
                )
            self._stash.append((name, removed, weight[removed]))
            weight.masked_fill_(removed, 0)
            self.merged_adapters.append(name)

    def unmerge(self) -> None:
        """Put the removed weights back, last in first out."""
        if not self.merged:
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
            return
        while self._stash:
            name, removed, values = self._stash.pop()
            self.weight.data[removed] = values
            self.merged_adapters.remove(name)

    def __repr__(self) -> str:
        return self.prefix.removesuffix("_") + "." + super().__repr__()


def pruning_layers(model: nn.Module, adapter_name: Optional[str] = None) -> list[PruningLayer]:
    """All pruning layers of a model, wrapped in whatever it is; only those with the given adapter if one is named."""
    layers = [m for m in model.modules() if isinstance(m, PruningLayer)]
    if adapter_name is not None:
        layers = [layer for layer in layers if adapter_name in layer._get_available_adapters()]
    return layers
