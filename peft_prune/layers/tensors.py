"""What a pruning layer holds of each adapter."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ..peft_api import BaseTunerLayer, BufferDict
from .cached_weight import CachedWeight
from .host import Host


class AdapterTensors(nn.Module, BaseTunerLayer):
    """What a layer that replaces a target module holds.

    While an adapter is trained, a layer holds its `bits` (uint8, packed: the current mask), `progress` (int64:
    optimizer step, total steps, number of weights kept), and what importance and update train: `scores` (float, one for
    each unit) or their factors `scores_A` and `scores_B`, perhaps with a calibrated `start` (int32); `update` (float,
    shape (out, in)), or `A`, `B`, `sparse` and `support`. Once it is final, a layer holds `mask` (uint8, entropy
    coded), and of the update `values` (uint8) or what it trained. All are named with the method's prefix, `smp_scores`
    and so on, as PEFT and Transformers want it.
    Everything is (out, in) whatever the layout of the base weight. What else is known of an adapter is in `host`.

    Args:
        base_layer (`nn.Module`): the module to prune.
        prefix (`str`): the method's prefix, such as `"smp_"`.
        module_name (`str`): name of the module in the base model.
    """

    # whether input j is multiplied with column j of the matrix
    columns_are_inputs = False
    # without the prefix: parameters, and persistent buffers
    trained_names: tuple[str, ...] = ("scores", "scores_A", "scores_B", "update", "A", "B", "sparse")
    stored_names: tuple[str, ...] = ("mask", "values", "progress", "bits", "start", "support")

    def __init__(self, base_layer: nn.Module, prefix: str, module_name: str) -> None:
        super().__init__()
        self.training = base_layer.training  # an adapter that is added to a model in eval mode is in eval mode
        self.base_layer = base_layer
        self.prefix = prefix
        self.module_name = module_name
        self.adapter_layer_names = tuple(prefix + name for name in self.trained_names)
        stored = tuple(prefix + name for name in self.stored_names)
        self.other_param_names = (*stored, "host", "penalty_grad")
        for name in self.adapter_layer_names:
            setattr(self, name, nn.ParameterDict())
        for name in stored:
            setattr(self, name, BufferDict(persistent=True))
        # 0-dim factor of σ'(S); armed for one backward pass each optimizer step
        self.penalty_grad = BufferDict(persistent=False)
        self.host: dict[str, Host] = {}
        # merged adapters, what they changed and what was there, first in first
        self._stash: list[tuple[str, torch.Tensor, torch.Tensor]] = []
        self.cached_weight = CachedWeight()
        self._disable_adapters = False
        self.merged_adapters: list[str] = []
        self.is_whole = False  # while parameters that are split among processes are gathered
        self._shape = self.shape  # as long as it is known: FSDP 1 and DeepSpeed flatten weights
        # True while a callback advances the schedule and finalizes at the end
        self.schedule_is_managed = False
        self.register_load_state_dict_post_hook(_after_loading)

    def held(self, kind: str) -> Any:
        """Parameters or buffers of a kind, such as `"scores"`, by adapter name."""
        return getattr(self, self.prefix + kind)

    def config(self, adapter_name: str) -> Any:
        """Configuration of an adapter."""
        return self.host[adapter_name].config

    def record(self, adapter_name: str) -> dict[str, Any]:
        """What the config of a final adapter records of this layer."""
        return (self.host[adapter_name].config.mask_info or {})[self.module_name]

    def drop_cached(self) -> None:
        """Let go of what was made from tensors that have changed. Compiled forward passes notice changes by this."""
        for host in self.host.values():
            host.drop_decoded()
        self.cached_weight.clear()

    def after_loading(self, missing: list[str]) -> None:
        """Take over tensors that `load_state_dict` has put in place."""
        self.drop_cached()

    @property
    def scores(self) -> nn.ParameterDict:
        """Scores by adapter name: float, shape (out / rows, in / columns) of the units that share one."""
        return self.held("scores")

    @property
    def update(self) -> nn.ParameterDict:
        """What is added to the weight, by adapter name: float, shape (out, in)."""
        return self.held("update")

    @property
    def values(self) -> BufferDict:
        """Kept values by adapter name in their stored form: uint8, one dimension."""
        return self.held("values")

    @property
    def mask(self) -> BufferDict:
        """Final masks by adapter name in their stored form: uint8, one dimension."""
        return self.held("mask")

    @property
    def progress(self) -> BufferDict:
        """Step, total steps, weights kept, by adapter name: int64, shape (3,).

        The step is -1 before the first update of the schedule, and -2 before a calibrated start is known.
        """
        return self.held("progress")

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

    def empty_bytes(self, size: int) -> torch.Tensor:
        """Room for what is loaded: uint8, one dimension."""
        return torch.zeros(size, dtype=torch.uint8, device=self.weight.device)

    def _as_matrix(self, tensor: torch.Tensor) -> torch.Tensor:
        """View a tensor of the base weight's layout as (out, in), or back."""
        return tensor

    def _get_available_adapters(self) -> set[str]:
        return set(self.host)


def _after_loading(layer: AdapterTensors, keys: Any) -> None:
    """A function and not a method: copies of a layer would go on calling the method of the original."""
    layer.after_loading(keys.missing_keys)
