"""The layer that all pruning methods share: a linear layer seen through a mask."""

from __future__ import annotations

import zlib
from abc import abstractmethod
from typing import Any, Optional

import torch
from peft.tuners._buffer_dict import BufferDict
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import get_pattern_key
from torch import nn

from ..config import PruningConfig
from ..masks.codec import (
    describe_mask,
    describe_values,
    encode_mask,
    load_mask,
    load_values,
    mask_to_blocks,
    stored_size,
)
from ..masks.fingerprint import fingerprint
from ..masks.granularity import Granularity, parse_granularity, pool, spread
from ..masks.hard_concrete import draw_noise, hard_concrete
from ..masks.importance import initial_scores
from ..masks.values import encode_values
from . import merging
from .masked_weight import MaskedWeight, Penalized
from .mixed_forward import mixed_batch_forward
from .watch import ScheduleWatch, warn_once


BASE = "__base__"  # PEFT's name for no adapter, in `adapter_names`


class PruningLayer(nn.Module, BaseTunerLayer):
    """Base of the layers that replace a target module.

    Of each adapter a layer holds, while it is trained, `progress` (int64: optimizer step, total steps, number of
    weights kept), and as the method has them `scores` (float, one for each block of weights) and `update` (float, shape
    (out, in): what is added to the weight); or, once final, `mask` (uint8, entropy coded) and `values` (uint8, the kept
    values, if the method changes them). All are named with the method's prefix, `smp_scores` and so on, as PEFT and
    Transformers want it. Everything is (out, in) whatever the layout of the base weight.

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
        self.adapter_layer_names = (prefix + "scores", prefix + "update")
        stored = (prefix + "mask", prefix + "values", prefix + "progress")
        self.other_param_names = (*stored, "pruning_config", "granularity", "penalty_grad", "_masks", "_values")
        for name in self.adapter_layer_names:
            setattr(self, name, nn.ParameterDict())
        for name in stored:
            setattr(self, name, BufferDict(persistent=True))
        # 0-dim factor of σ'(S); armed for one backward pass each optimizer step
        self.penalty_grad = BufferDict(persistent=False)
        self.penalty_armed: set[str] = set()
        self.pruning_config: dict[str, PruningConfig] = {}
        self.granularity: dict[str, Granularity] = {}
        # per adapter: what the mask was computed from, the versions of that, the mask
        self._masks: dict[str, tuple[tuple[torch.Tensor, ...], list[int], torch.Tensor]] = {}
        self._values: dict[str, torch.Tensor] = {}
        self._stash: list[tuple[str, torch.Tensor, torch.Tensor]] = []
        self._disable_adapters = False
        self.merged_adapters: list[str] = []
        self._watch = ScheduleWatch()
        # True while a callback advances the schedule and finalizes at the end
        self.schedule_is_managed = False

    @property
    def scores(self) -> nn.ParameterDict:
        """Scores by adapter name: float, shape (out / rows, in / columns) of the blocks that share one."""
        return getattr(self, self.prefix + "scores")

    @property
    def update(self) -> nn.ParameterDict:
        """What is added to the weight, by adapter name: float, shape (out, in)."""
        return getattr(self, self.prefix + "update")

    @property
    def values(self) -> BufferDict:
        """Kept values by adapter name in their stored form: uint8, one dimension."""
        return getattr(self, self.prefix + "values")

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

    def update_layer(
        self,
        adapter_name: str,
        config: PruningConfig,
        inference_mode: bool = False,
        granularity: Optional[Granularity] = None,
    ) -> None:
        """Add an adapter: what is trained, or room for the final mask when the config says that it is final."""
        self.pruning_config[adapter_name] = config
        self.granularity[adapter_name] = granularity or parse_granularity(config.granularity)
        if config.finalized:
            info = (config.mask_info or {})[self.module_name]
            self.mask[adapter_name] = self._bytes(stored_size(info))
            if "values" in info:
                self.values[adapter_name] = self._bytes(info["values"]["bytes"])
        elif config.trains:
            self._add_trained(adapter_name, config)
        self._move_adapter_to_device_of_base_layer(adapter_name)
        self.set_adapter(self.active_adapters, inference_mode=inference_mode)

    def _bytes(self, size: int) -> torch.Tensor:
        return torch.zeros(size, dtype=torch.uint8, device=self.weight.device)

    def _add_trained(self, name: str, config: PruningConfig) -> None:
        matrix = self.matrix
        kind = config.score_init if config.init_weights else "random"
        if self.merged and (kind == "magnitude" or config.updates_weights):
            raise ValueError(
                f"Adapter {name!r} starts from the weight of {self.module_name!r}, into which {self.merged_adapters} "
                "are merged. Call model.unmerge_adapter() first."
            )
        if config.learns_scores:
            self.scores[name] = nn.Parameter(initial_scores(matrix, kind, self.block(name)))
        if config.updates_weights:
            self.update[name] = nn.Parameter(torch.zeros(matrix.shape, dtype=torch.float32, device=matrix.device))
        if config.from_existing_zeros:
            kept = int((matrix != 0).sum())
        else:
            sparsity = config.initial_sparsity if config.init_weights else self.target_sparsity(name)
            kept = self.granularity[name].count(1.0 - sparsity, self.shape)
        self.progress[name] = torch.tensor([-1, 0, kept], dtype=torch.int64, device=matrix.device)
        self.penalty_grad[name] = torch.zeros((), dtype=torch.float32, device=matrix.device)

    def block(self, adapter_name: str) -> tuple[int, int]:
        """Rows and columns of the blocks that are kept or removed as one."""
        return self.granularity[adapter_name].block(self.shape)

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

    def ranking(self, adapter_name: str) -> torch.Tensor:
        """What decides which blocks stay, the largest first: float, shape (out / rows, in / columns)."""
        if adapter_name in self.scores:
            return self.scores[adapter_name]
        magnitude = self._updated(adapter_name, self.matrix).detach().abs()
        return pool(magnitude, self.block(adapter_name))

    @torch.compiler.disable
    def _current_mask(self, adapter_name: str) -> torch.Tensor:
        holders = (self.mask,) if adapter_name in self.mask else (self.scores, self.update, self.progress)
        sources = tuple(holder[adapter_name] for holder in holders if adapter_name in holder)
        if not sources:
            raise ValueError(self.pruning_config[adapter_name].without_mask)
        versions = [t._version for t in sources]
        cached = self._masks.get(adapter_name)
        if cached is not None and cached[1] == versions:
            # held by the cache, so an identity cannot be somebody else's
            if all(old is new for old, new in zip(cached[0], sources, strict=True)):
                return cached[2]
        mask = self._compute_mask(adapter_name)
        self._masks[adapter_name] = (sources, versions, mask)
        return mask

    def _compute_mask(self, adapter_name: str) -> torch.Tensor:
        config = self.pruning_config[adapter_name]
        if adapter_name in self.mask:
            info = (config.mask_info or {})[self.module_name]
            return load_mask(self.module_name, self.mask[adapter_name], info, config.mask_format)
        if config.from_existing_zeros:
            return self.matrix != 0
        block = self.block(adapter_name)
        kept = self.kept(adapter_name) // (block[0] * block[1])
        return spread(self.granularity[adapter_name].units(self.ranking(adapter_name), kept), block)

    # ---------------------------------------------------------------- the end

    def mask_block(self, adapter_name: str) -> Optional[tuple[int, int]]:
        """Rows and columns of the blocks that the final mask is stored in, `None` for single weights."""
        info = (self.pruning_config[adapter_name].mask_info or {})[self.module_name]
        return tuple(info["block"]) if "block" in info else None

    def finalize(self, adapter_name: str) -> dict[str, Any]:
        """Replace what is trained by mask and values in their stored form, and return what the config records."""
        block, config = self.block(adapter_name), self.pruning_config[adapter_name]
        matrix = self.adapted(adapter_name, self.matrix).detach() if config.stores_values else None
        mask = self.get_mask(adapter_name)
        info = self.set_mask(adapter_name, mask, None if block == (1, 1) else block)
        if matrix is not None:
            info |= self.set_values(adapter_name, matrix, mask, config.value_dtype)
        for name in (*self.adapter_layer_names, self.prefix + "progress", "penalty_grad"):
            if adapter_name in getattr(self, name):
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
            raise ValueError(f"{self.module_name!r} is merged. Call model.unmerge_adapter() before finalize.")
        info, stored = self.stored_form(mask, block)
        self._masks.pop(adapter_name, None)
        self.mask[adapter_name] = stored.to(self.weight.device)
        return info

    def set_values(self, adapter_name: str, matrix: torch.Tensor, mask: torch.Tensor, dtype: str) -> dict[str, Any]:
        """Give an adapter its kept values, those of a matrix (out, in), and return what the config records of them."""
        stored = encode_values(matrix, mask, dtype)
        self._values.pop(adapter_name, None)
        self.values[adapter_name] = stored.to(self.weight.device)
        return {"values": describe_values(stored, dtype)}

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
        self._values = {name: value for name, value in self._values.items() if name in self.active_adapters}

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
                if self.training and self.pruning_config[name].init_weights:
                    watched = self.scores if name in self.scores else self.update
                    self._watch.look(name, watched[name], self.progress[name])
                weight = self._as_matrix(self._trained(name, self._as_matrix(weight)))
            elif name in self.mask:
                weight = self._as_matrix(self.adapted(name, self._as_matrix(weight)))
            else:
                warn_once("calibrate", self.pruning_config[name].without_mask)
        return weight

    def changes_weights(self, adapter_name: str) -> bool:
        """Whether an adapter has weights of its own, and not only a mask."""
        return adapter_name in self.values or adapter_name in self.update

    def _updated(self, name: str, matrix: torch.Tensor) -> torch.Tensor:
        """The matrix with the adapter's update, in the dtype of the matrix."""
        return (matrix + self.update[name]).to(matrix.dtype) if name in self.update else matrix

    def _trained(self, name: str, matrix: torch.Tensor) -> torch.Tensor:
        """What training sees of a matrix (out, in), with gradients for scores and update."""
        matrix, scores = self._updated(name, matrix), self.scores[name] if name in self.scores else None
        if scores is None:
            return matrix * self.get_mask(name)
        mask, penalty = self.get_mask(name), self._take_penalty(name, scores)
        if not self.pruning_config[name].gated:
            return MaskedWeight.apply(scores, matrix, mask, penalty, self.block(name))
        if penalty is not None:
            scores = Penalized.apply(scores, penalty, self.pruning_config[name].penalty_offset)
        return matrix * spread(hard_concrete(scores, self._noise(name)), self.block(name)).to(matrix.dtype)

    def _noise(self, name: str) -> Optional[torch.Tensor]:
        """Noise of the gates, in training only; the same on all ranks, another for each layer and step."""
        if not (self.training and torch.is_grad_enabled()):
            return None
        step = int(self.progress[name][0])
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

    def _kept_values(self, name: str) -> torch.Tensor:
        """Kept values as a matrix: float32, shape (out, in), decoded once."""
        if name not in self._values:
            self._decode_values(name)
        return self._values[name]

    @torch.compiler.disable
    def _decode_values(self, name: str) -> None:
        info = (self.pruning_config[name].mask_info or {})[self.module_name]["values"]
        self._values[name] = load_values(self.module_name, self.values[name], self.get_mask(name), info)

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
        return self._apply_weight(x, self.effective_weight(self.weight))

    @abstractmethod
    def _apply_weight(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """What the base layer computes of its input, with another weight in its own layout."""

    # ------------------------------------------------------------------- merge

    def merge(self, safe_merge: bool = False, adapter_names: Optional[list[str]] = None) -> None:
        """Put the effective weight into the base layer; what was there is kept for a bit-exact `unmerge`.

        Args:
            safe_merge (`bool`): check first that the weights that stay are finite.
            adapter_names (`list[str]`, *optional*): adapters to merge, by default the active ones.

        Raises:
            ValueError: `safe_merge` found values that are not finite; nothing was changed then.
        """
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
