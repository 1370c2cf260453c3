"""What a pruning layer holds of each adapter."""

from __future__ import annotations

from typing import Any

import torch
from peft.tuners._buffer_dict import BufferDict
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from ..config import PruningConfig
from ..masks.granularity import Granularity
from ..masks.warm_start import LastThreshold
from .cached_weight import CachedWeight
from .low_rank_scores import Start
from .watch import ScheduleWatch


class Holdings(nn.Module, BaseTunerLayer):
    """What a layer that replaces a target module holds.

    While an adapter is trained, a layer holds its `bits` (uint8, packed: the mask in force), `progress` (int64:
    optimizer step, total steps, number of weights kept), and as the method has them `scores` (float, one for each block
    of weights) or their factors `scores_A` and `scores_B` (float, see `Start.scores`), and `update` (float, shape
    (out, in): what is added to the weight). Once it is final, a layer holds `mask` (uint8, entropy coded) and `values`
    (uint8, the kept values, if the method changes them). All are named with the method's prefix, `smp_scores` and so
    on, as PEFT and Transformers want it. Everything is (out, in) whatever the layout of the base weight.

    Args:
        base_layer (`nn.Module`): the module to prune.
        prefix (`str`): the method's prefix, such as `"smp_"`.
        module_name (`str`): name of the module in the base model.
    """

    # what a layer holds of an adapter, without the prefix: parameters, and persistent buffers
    score_names: tuple[str, ...] = ("scores", "scores_A", "scores_B")
    trained_names: tuple[str, ...] = (*score_names, "update")
    watched_names: tuple[str, ...] = trained_names  # of which the first that is there tells whether training goes on
    stored_names: tuple[str, ...] = ("mask", "values", "progress", "bits")
    derived_names: tuple[str, ...] = ("bits",)  # of these, what can be found again where an old file lacks it

    def __init__(self, base_layer: nn.Module, prefix: str, module_name: str) -> None:
        super().__init__()
        self.training = base_layer.training  # an adapter that is added to a model in eval mode is in eval mode
        self.base_layer = base_layer
        self.prefix = prefix
        self.module_name = module_name
        self.adapter_layer_names = tuple(prefix + name for name in self.trained_names)
        stored = tuple(prefix + name for name in self.stored_names)
        of_host = ("_masks", "_values", "_counted", "_thresholds")
        self.other_param_names = (*stored, "pruning_config", "granularity", "penalty_grad", "score_starts", *of_host)
        for name in self.adapter_layer_names:
            setattr(self, name, nn.ParameterDict())
        for name in stored:
            setattr(self, name, BufferDict(persistent=True))
        # 0-dim factor of σ'(S); armed for one backward pass each optimizer step
        self.penalty_grad = BufferDict(persistent=False)
        self.penalty_armed: set[str] = set()
        self.pruning_config: dict[str, PruningConfig] = {}
        self.granularity: dict[str, Granularity] = {}
        self.score_starts: dict[str, Start] = {}  # of scores of low rank
        # per adapter with a final mask: the stored tensor, its version, and the mask in bits
        self._masks: dict[str, tuple[torch.Tensor, int, torch.Tensor]] = {}
        self._values: dict[str, torch.Tensor] = {}
        self._thresholds: dict[str, LastThreshold] = {}  # what only makes the next selection faster
        # per adapter: `progress` and its version, and what the host knows it to hold
        self._counted: dict[str, tuple[torch.Tensor, int, list[Any]]] = {}
        self._stash: list[tuple[str, torch.Tensor, torch.Tensor]] = []
        self.cached_weight = CachedWeight()
        self._disable_adapters = False
        self.merged_adapters: list[str] = []
        self.shards: set[str] = set()  # adapters whose parameters FSDP or DeepSpeed manages, see `distributed.py`
        self.is_whole = False
        self._shape = self.shape  # as long as it is known: FSDP 1 and DeepSpeed flatten weights
        self._watch = ScheduleWatch()
        # True while a callback advances the schedule and finalizes at the end
        self.schedule_is_managed = False
        self.register_load_state_dict_post_hook(_after_loading)

    def drop_cached(self) -> None:
        """Let go of what was made from tensors that have changed. Compiled forward passes notice changes by this."""
        self._masks.clear()
        self._values.clear()
        self.cached_weight.clear()

    def after_loading(self, missing: list[str]) -> None:
        """Take over tensors that `load_state_dict` has put in place, for the methods that derive something."""
        self.drop_cached()

    def held(self, kind: str) -> Any:
        """Parameters or buffers of a kind, such as `"scores"`, by adapter name."""
        return getattr(self, self.prefix + kind)

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
        out_features, in_features = self.matrix.shape if self.weight.dim() > 1 else self._shape
        return int(out_features), int(in_features)

    @property
    def in_features(self) -> int:
        """Inputs of the pruned matrix."""
        return self.shape[1]

    @property
    def out_features(self) -> int:
        """Outputs of the pruned matrix."""
        return self.shape[0]

    def _as_matrix(self, tensor: torch.Tensor) -> torch.Tensor:
        """View a tensor of the base weight's layout as (out, in), or back."""
        return tensor

    def _get_available_adapters(self) -> set[str]:
        return set(self.pruning_config)


def _after_loading(layer: Holdings, keys: Any) -> None:
    """A function and not a method: copies of a layer would go on calling the method of the original."""
    layer.after_loading(keys.missing_keys)
