"""How adapters are added to a layer, and the current mask."""

from __future__ import annotations

import math
from typing import Any, Optional

import torch

from ..matching import pattern_of
from ..selection.device import on_cpu
from ..selection.granularity import Granularity, parse_granularity
from ..storage.bits import count_bits, pack_bits, unpack_bits
from ..storage.codec import load_bits, stored_size
from .cached_weight import version
from .host import Host
from .tensors import AdapterTensors


WAITING = -2  # the step, before a calibrated start is known


class AdapterMasks(AdapterTensors):
    """[`AdapterTensors`] with masks: in training the bits that [`set_bits`] has written, later the stored ones."""

    # ------------------------------------------------------------------ set-up

    @torch.inference_mode(False)  # tensors that are made there count no changes
    @torch.no_grad()
    def update_layer(
        self,
        adapter_name: str,
        config: Any,
        inference_mode: bool = False,
        granularity: Optional[Granularity] = None,
        **of_host: Any,
    ) -> None:
        """Add an adapter: what is trained, or room for the final mask when the config says that it is final.

        Args:
            adapter_name (`str`): its name.
            config ([`PruningConfig`]): its configuration.
            inference_mode (`bool`): whether its parameters are frozen.
            granularity ([`Granularity`], *optional*): by default the one that the config spells.
            **of_host: further fields of its [`Host`].
        """
        recipe = config.recipe()
        granularity = granularity or parse_granularity(config.granularity)
        self.host[adapter_name] = Host(config, recipe, granularity, **of_host)
        if config.finalized:
            self.mask[adapter_name] = self.empty_bytes(stored_size(self.record(adapter_name)))
            recipe.update.add(self, adapter_name)
        elif recipe.trained:
            self._add_trained(adapter_name)
        self._move_adapter_to_device_of_base_layer(adapter_name)
        if adapter_name in self.progress and self._can_be_ranked(adapter_name):
            self.renew(adapter_name)
        self.set_adapter(self.active_adapters, inference_mode=inference_mode)

    def _add_trained(self, name: str) -> None:
        host = self.host[name]
        recipe, config = host.recipe, host.config
        starts_from_weights = recipe.update.tensors or getattr(config, "score_init", None) == "magnitude"
        if self.merged and starts_from_weights:
            raise ValueError(
                f"Adapter {name!r} starts from the weight of {self.module_name!r}, into which {self.merged_adapters} "
                "are merged. Call model.unmerge_adapter() first."
            )
        recipe.importance.add(self, name)
        recipe.update.add(self, name)
        if recipe.importance.calibrated_start is None:
            self._add_progress(name, recipe.rule.at_first(self, name))
        else:
            self._add_progress(name, math.prod(self.shape), step=WAITING)
        if recipe.importance.tensors:
            self.penalty_grad[name] = torch.zeros((), dtype=torch.float32, device=self.weight.device)

    def _add_progress(self, name: str, kept: int, step: int = -1) -> None:
        """Counters of a training that has not begun, and a mask that keeps everything until [`renew`] finds one."""
        self.progress[name] = torch.tensor([step, 0, kept], dtype=torch.int64, device=self.weight.device)
        self.start_bits(name, torch.ones(self.shape, dtype=torch.bool))

    def start_bits(self, name: str, mask: torch.Tensor) -> None:
        """Give an adapter that has no mask yet one (bool, shape (out, in)) that is not final."""
        self.held("bits")[name] = pack_bits(mask).to(self.weight.device)
        self.cached_weight.clear()

    def _can_be_ranked(self, name: str) -> bool:
        """Whether scores and weights are there: while a checkpoint is loaded, they may be on device "meta"."""
        held = [self.held(kind)[name] for kind in self.trained_names if name in self.held(kind)]
        return not any(tensor.is_meta for tensor in (self.weight, *held))

    def block(self, adapter_name: str) -> tuple[int, int]:
        """Rows and columns of the units that are kept or removed as one."""
        return self.host[adapter_name].granularity.block(self.shape)

    def unit_count(self, adapter_name: str) -> int:
        """Number of units of the matrix."""
        return math.prod(self.shape) // math.prod(self.block(adapter_name))

    def own_sparsity(self, adapter_name: str) -> Optional[float]:
        """What `sparsity_pattern` says of this module, `None` if nothing."""
        pattern = getattr(self.config(adapter_name), "sparsity_pattern", None) or {}
        return pattern.get(pattern_of(pattern, self.module_name))

    def target_sparsity(self, adapter_name: str) -> float:
        """Final sparsity of this module: its own if it has one, what calibration gave it, or the config's."""
        for own in (self.own_sparsity(adapter_name), self.host[adapter_name].allotted):
            if own is not None:
                return own
        return self.config(adapter_name).sparsity

    def has_scores(self, adapter_name: str) -> bool:
        """Whether an adapter has scores in training, whole or as factors."""
        return any(adapter_name in self.held(kind) for kind in self.host[adapter_name].recipe.importance.tensors)

    # ---------------------------------------------------------------- progress

    def kept(self, adapter_name: str) -> int:
        """Number of weights that the adapter keeps at present."""
        if adapter_name in self.mask:
            return int(self.record(adapter_name)["kept"])
        if adapter_name not in self.progress:  # not calibrated yet
            return int(self.get_mask(adapter_name).sum()) if self.has_mask(adapter_name) else math.prod(self.shape)
        known = self._known(adapter_name)
        if known[2] is None:
            known[2] = int(self.progress[adapter_name][2])
        return known[2]

    def steps(self, adapter_name: str) -> tuple[int, int]:
        """Optimizer step at which the mask was set (negative before the first time), and steps of the training."""
        step, total, _ = self._known(adapter_name)
        return step, total

    def waits_for_start(self, adapter_name: str) -> bool:
        """Whether an adapter's scores are to start at what calibration finds, and nobody has called it."""
        return adapter_name in self.progress and self.steps(adapter_name)[0] == WAITING

    def _known(self, adapter_name: str) -> list[Any]:
        """What `progress` holds; `None` for weights kept that only the device knows."""
        progress, host = self.progress[adapter_name], self.host[adapter_name]
        known = host.counted
        if known is None or known[0] is not progress or known[1] != version(progress):
            known = host.counted = (progress, version(progress), progress.tolist())
        return known[2]

    def set_kept(self, adapter_name: str, kept: Optional[int | torch.Tensor], step: int, total_steps: int) -> None:
        """Set how many weights the adapter keeps from here on.

        A tensor (int64, 0-dim) is not read, and `None` is as many as before.
        """
        progress, known = self.progress[adapter_name], self._known(adapter_name)[2]
        progress[0].fill_(step)
        progress[1].fill_(total_steps)
        if isinstance(kept, torch.Tensor):
            progress[2].copy_(kept, non_blocking=True)
            known = None
        elif kept is not None:
            progress[2].fill_(kept)
            known = kept
        self.host[adapter_name].counted = (progress, version(progress), [step, total_steps, known])

    def kept_unread(self, adapter_name: str) -> int | torch.Tensor:
        """[`kept`], as a tensor (int64, 0-dim) where only the device knows it."""
        if adapter_name not in self.progress or on_cpu(self.progress[adapter_name]):
            return self.kept(adapter_name)
        known = self._known(adapter_name)[2]
        return self.progress[adapter_name][2] if known is None else known

    # ------------------------------------------------------------------- masks

    def has_mask(self, adapter_name: str) -> bool:
        """Whether an adapter has a mask yet: methods that are calibrated have none before."""
        return adapter_name in self.mask or adapter_name in self.held("bits")

    def get_mask(self, adapter_name: str) -> torch.Tensor:
        """Current mask: bool, shape (out, in)."""
        return unpack_bits(self.mask_bits(adapter_name), self.shape)

    def mask_bits(self, adapter_name: str) -> torch.Tensor:
        """Current mask, packed: uint8, one dimension. It stays the same tensor until the mask is final."""
        bits = self.held("bits")
        if adapter_name in bits:
            return bits[adapter_name]
        unpacked = self.host[adapter_name].unpacked
        if torch.compiler.is_compiling() and unpacked is not None:
            return unpacked[2]  # nothing here to trace, and tensor versions cannot be
        return self._unpacked(adapter_name)

    @torch.inference_mode(False)
    @torch.no_grad()
    def set_bits(self, adapter_name: str, mask: torch.Tensor) -> None:
        """Set the mask (bool, shape (out, in)). Every change of a mask before it is final goes through here."""
        self.held("bits")[adapter_name].copy_(pack_bits(mask))
        self.cached_weight.clear()

    @torch.compiler.disable
    def renew(self, adapter_name: str) -> None:
        """Find the mask again, as the method's rule says, and set it. Rules that choose once do nothing."""
        host = self.host[adapter_name]
        if self.merged and host.recipe.needs_weights:
            raise ValueError(
                f"The mask of {adapter_name!r} follows from the weight of {self.module_name!r}, into which "
                f"{self.merged_adapters} are merged. Call model.unmerge_adapter() first."
            )
        if host.recipe.chosen_layer_by_layer and not self.waits_for_start(adapter_name):
            with torch.inference_mode(False), torch.no_grad():
                self.set_bits(adapter_name, host.recipe.rule.choose(self, adapter_name))

    def after_loading(self, missing: list[str]) -> None:
        """As for every layer; and find the masks of checkpoints that were written before masks were saved with them."""
        super().after_loading(missing)

        def lacks(kind: str, name: str) -> bool:
            return any(key.endswith(f"{self.module_name}.{self.prefix}{kind}.{name}") for key in missing)

        for name in self.progress.keys():
            absent = lacks("bits", name) and not lacks("progress", name)
            if self._can_be_ranked(name) and (absent or count_bits(self.mask_bits(name)) != self.kept(name)):
                self.renew(name)

    def can_find(self, adapter_name: str, kind: str) -> bool:
        """Whether a stored tensor can be found again where a file of an earlier version lacks it."""
        return kind == "bits" and self.host[adapter_name].recipe.chosen_layer_by_layer

    def sources(self, adapter_name: str) -> list[torch.Tensor]:
        """What the weight that an adapter makes follows from, the base weight apart."""
        holders = (self.held(kind) for kind in (*self.trained_names, *self.stored_names))
        return [holder[adapter_name] for holder in holders if adapter_name in holder]

    def decode_if_active(self, adapter_name: str) -> None:
        """Decode an active adapter's final mask now, so that damage shows at load and the first forward pass is fast.

        Raises:
            MaskFormatError: the mask is damaged; the message names the module.
        """
        if adapter_name in self.mask and adapter_name in self.active_adapters and not self.mask[adapter_name].is_meta:
            self.mask_bits(adapter_name)

    @torch.compiler.disable
    @torch.inference_mode(False)  # a mask that is unpacked there may be needed for training
    @torch.no_grad()
    def _unpacked(self, adapter_name: str) -> torch.Tensor:
        """A final mask in bits, checked when it is unpacked."""
        host = self.host[adapter_name]
        if adapter_name not in self.mask:
            raise ValueError(not_calibrated(host.config))
        stored = self.mask[adapter_name]
        # held by the host, so the identity cannot be somebody else's
        if host.unpacked is not None and host.unpacked[0] is stored and host.unpacked[1] == version(stored):
            return host.unpacked[2]
        if torch.compiler.is_compiling():  # torch.export, whose tensors are fake
            raise RuntimeError(
                f"The mask of {self.module_name!r} has not been unpacked yet. Call the model once before torch.export."
            )
        bits = load_bits(self.module_name, stored, self.record(adapter_name), host.config.mask_format)
        host.unpacked = (stored, version(stored), bits)
        return host.unpacked[2]


def not_calibrated(config: Any) -> str:
    """What to tell who uses an adapter that has no mask yet."""
    method = getattr(config.peft_type, "value", config.peft_type)
    return (
        f"This {method} adapter has not been calibrated, so it prunes nothing yet. Call peft_prune.calibrate(model, "
        "batches) first."
    )


def not_started(name: str, config: Any) -> str:
    """What to tell who trains scores whose calibrated start is not known."""
    return (
        f"the scores of adapter {name!r} start at score_init={config.score_init!r}, which needs inputs, but the "
        "model has not been calibrated. Call peft_prune.calibrate(model, batches) once before training; "
        "PruningTrainer and PruningCallback do so with examples of the training data. Or use "
        "score_init='magnitude', which needs no inputs."
    )
