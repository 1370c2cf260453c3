"""What a pruning layer is given of each adapter, and the mask that follows from it."""

from __future__ import annotations

import math
from typing import Any, Optional

import torch
from torch import nn

from ..config import DEFAULT_SPARSITY, PruningConfig
from ..masks.bits import pack_bits, unpack_bits
from ..masks.codec import load_mask, stored_size
from ..masks.device import on_cpu
from ..masks.granularity import Granularity, parse_granularity, pool, spread
from ..masks.importance import initial_scores
from ..masks.warm_start import LastThreshold
from .cached_weight import version
from .holdings import Holdings
from .low_rank_scores import Start, initial_factors
from .matching import pattern_of


class AdapterState(Holdings):
    """How adapters are added to a layer, and what mask follows from what it holds, see [`Holdings`]."""

    # ------------------------------------------------------------------ set-up

    @torch.inference_mode(False)  # tensors that are made there count no changes
    @torch.no_grad()
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
        if adapter_name in self.progress and self._can_be_ranked(adapter_name):
            self.renew(adapter_name)
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
        if config.learns_scores and config.score == "low_rank":
            self._add_factors(name, config)
        elif config.learns_scores:
            self.scores[name] = nn.Parameter(initial_scores(matrix, kind, self.block(name)))
        if config.updates_weights:
            update = torch.zeros(matrix.shape, dtype=torch.float32, device=matrix.device)
            if not (config.init_weights or config.learns_scores or config.from_existing_zeros):
                update.normal_(0, float(matrix.detach().abs().mean()))  # no score that could be random
            self.update[name] = nn.Parameter(update)
        if config.from_existing_zeros:
            kept = int((matrix != 0).sum())
        else:
            final = DEFAULT_SPARSITY if config.finds_sparsity else self.target_sparsity(name)
            sparsity = config.initial_sparsity if config.init_weights else final
            kept = self.granularity[name].count(1.0 - sparsity, self.shape)
        self._add_progress(name, kept)
        self.penalty_grad[name] = torch.zeros((), dtype=torch.float32, device=matrix.device)

    def _add_progress(self, name: str, kept: int) -> None:
        """Counters of a training that has not begun, and a mask that keeps everything until [`renew`] finds one."""
        device = self.weight.device
        self.progress[name] = torch.tensor([-1, 0, kept], dtype=torch.int64, device=device)
        self.held("bits")[name] = pack_bits(torch.ones(self.shape, dtype=torch.bool)).to(device)

    def _can_be_ranked(self, name: str) -> bool:
        """Whether scores and weights are there: while a checkpoint is loaded, they may be on device "meta"."""
        held = [self.held(kind)[name] for kind in self.trained_names if name in self.held(kind)]
        return not any(tensor.is_meta for tensor in (self.weight, *held))

    def _add_factors(self, name: str, config: PruningConfig) -> None:
        block = self.block(name)
        shape = (self.shape[0] // block[0], self.shape[1] // block[1])
        if config.score_rank >= min(shape):
            raise ValueError(
                f"score_rank={config.score_rank!r} is not below the smaller side of the {shape} scores of "
                f"{self.module_name!r}. Use a lower rank, or score='movement'."
            )
        self.score_starts[name] = Start.of(self.matrix, config.score_init, block)
        factors = initial_factors(shape, config.score_rank, self.weight.device, random=not config.init_weights)
        for kind, factor in zip(("scores_A", "scores_B"), factors, strict=True):
            self.held(kind)[name] = nn.Parameter(factor)

    def block(self, adapter_name: str) -> tuple[int, int]:
        """Rows and columns of the blocks that are kept or removed as one."""
        return self.granularity[adapter_name].block(self.shape)

    def own_sparsity(self, adapter_name: str) -> Optional[float]:
        """What `sparsity_pattern` says of this module, `None` if nothing."""
        pattern = self.pruning_config[adapter_name].sparsity_pattern or {}
        return pattern.get(pattern_of(pattern, self.module_name))

    def target_sparsity(self, adapter_name: str) -> float:
        """Final sparsity of this module: its own if it has one, otherwise the config's."""
        own = self.own_sparsity(adapter_name)
        sparsity = own if own is not None else self.pruning_config[adapter_name].sparsity
        assert sparsity is not None  # resolved by the config
        return sparsity

    # ------------------------------------------------------------------- masks

    def has_scores(self, adapter_name: str) -> bool:
        """Whether an adapter has scores in training, whole or as factors."""
        return any(adapter_name in self.held(kind) for kind in self.score_names)

    def score_count(self, adapter_name: str) -> int:
        """Number of scores, one for each block of weights."""
        return math.prod(self.shape) // math.prod(self.block(adapter_name))

    def kept(self, adapter_name: str) -> int:
        """Number of weights that the adapter keeps at present."""
        if adapter_name in self.mask:
            return int(self.pruning_config[adapter_name].mask_info[self.module_name]["kept"])  # type: ignore[index]
        if adapter_name not in self.progress:  # not calibrated yet
            return int(self.get_mask(adapter_name).sum()) if self.has_mask(adapter_name) else math.prod(self.shape)
        known = self._known(adapter_name)
        if known[2] is None:
            known[2] = int(self.progress[adapter_name][2])
        return known[2]

    def steps(self, adapter_name: str) -> tuple[int, int]:
        """Optimizer step at which the mask was set (-1 before the first time), and steps of the whole training."""
        step, total, _ = self._known(adapter_name)
        return step, total

    def _known(self, adapter_name: str) -> list[Any]:
        """What `progress` holds; `None` for weights kept that only the device knows."""
        progress = self.progress[adapter_name]
        known = self._counted.get(adapter_name)
        if known is None or known[0] is not progress or known[1] != version(progress):
            known = self._counted[adapter_name] = (progress, version(progress), progress.tolist())
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
        self._counted[adapter_name] = (progress, version(progress), [step, total_steps, known])

    def kept_unread(self, adapter_name: str) -> int | torch.Tensor:
        """[`kept`], as a tensor (int64, 0-dim) where only the device knows it."""
        if adapter_name not in self.progress or on_cpu(self.progress[adapter_name]):
            return self.kept(adapter_name)
        known = self._known(adapter_name)[2]
        return self.progress[adapter_name][2] if known is None else known

    def has_mask(self, adapter_name: str) -> bool:
        """Whether an adapter has a mask yet: methods that are calibrated have none before."""
        return adapter_name in self.mask or adapter_name in self.held("bits")

    def get_mask(self, adapter_name: str) -> torch.Tensor:
        """Mask in force: bool, shape (out, in)."""
        return unpack_bits(self.mask_bits(adapter_name), self.shape)

    def mask_bits(self, adapter_name: str) -> torch.Tensor:
        """Mask in force, packed: uint8, one dimension. It stays the same tensor until the mask is final."""
        bits = self.held("bits")
        if adapter_name in bits:
            return bits[adapter_name]
        if torch.compiler.is_compiling() and adapter_name in self._masks:
            return self._masks[adapter_name][2]  # nothing here to trace, and tensor versions cannot be
        return self._unpacked(adapter_name)

    @torch.inference_mode(False)
    @torch.no_grad()
    def set_bits(self, adapter_name: str, mask: torch.Tensor) -> None:
        """Put a mask (bool, shape (out, in)) in force. Every change of a mask in training goes through here."""
        self.held("bits")[adapter_name].copy_(pack_bits(mask))
        self.cached_weight.clear()

    @torch.compiler.disable
    def renew(self, adapter_name: str) -> None:
        """Find the mask again, from scores, weights and the number of weights to keep, and put it in force."""
        with torch.inference_mode(False), torch.no_grad():
            self.set_bits(adapter_name, self._choose(adapter_name))

    def after_loading(self, missing: list[str]) -> None:
        """As for every layer; and find the masks of checkpoints that were written before masks were saved with them."""
        super().after_loading(missing)

        def lacks(kind: str, name: str) -> bool:
            return any(key.endswith(f"{self.module_name}.{self.prefix}{kind}.{name}") for key in missing)

        for name in self.progress.keys():
            if lacks("bits", name) and not lacks("progress", name) and self._can_be_ranked(name):
                self.renew(name)

    def ranking(self, adapter_name: str) -> torch.Tensor:
        """What decides which blocks stay, the largest first: float, shape (out / rows, in / columns)."""
        if adapter_name in self.scores:
            scores = self.scores[adapter_name]
            return scores.detach().clone() if self.is_whole else scores  # what was gathered is gone soon
        if adapter_name in self.held("scores_A"):
            factors = (self.held(kind)[adapter_name].detach() for kind in ("scores_A", "scores_B"))
            return self.score_starts[adapter_name].scores(self.matrix, *factors)
        magnitude = self._updated(adapter_name, self.matrix).detach().abs()
        return pool(magnitude, self.block(adapter_name))

    @torch.compiler.disable
    @torch.inference_mode(False)  # a mask that is unpacked there may be needed for training
    @torch.no_grad()
    def _unpacked(self, adapter_name: str) -> torch.Tensor:
        """A final mask in bits, checked when it is unpacked."""
        config = self.pruning_config[adapter_name]
        if adapter_name not in self.mask:
            raise ValueError(config.without_mask)
        stored = self.mask[adapter_name]
        cached = self._masks.get(adapter_name)
        # held by the cache, so the identity cannot be somebody else's
        if cached is not None and cached[0] is stored and cached[1] == version(stored):
            return cached[2]
        if torch.compiler.is_compiling():  # torch.export, whose tensors are fake
            raise RuntimeError(
                f"The mask of {self.module_name!r} has not been unpacked yet. Call the model once before torch.export."
            )
        info = (config.mask_info or {})[self.module_name]
        bits = pack_bits(load_mask(self.module_name, stored, info, config.mask_format))
        self._masks[adapter_name] = (stored, version(stored), bits)
        return bits

    def sources(self, adapter_name: str) -> list[torch.Tensor]:
        """What the weight that an adapter makes follows from, the base weight apart."""
        holders = (self.held(kind) for kind in (*self.trained_names, *self.stored_names))
        return [holder[adapter_name] for holder in holders if adapter_name in holder]

    def _choose(self, adapter_name: str) -> torch.Tensor:
        """The mask that scores or weights ask for: bool, shape (out, in)."""
        config = self.pruning_config[adapter_name]
        if self.merged and config.needs_weights:
            raise ValueError(
                f"The mask of {adapter_name!r} follows from the weight of {self.module_name!r}, into which "
                f"{self.merged_adapters} are merged. Call model.unmerge_adapter() first."
            )
        if config.from_existing_zeros:
            return self.matrix != 0
        block = self.block(adapter_name)
        kept = self.kept_unread(adapter_name) // (block[0] * block[1])
        if isinstance(kept, int) and kept == self.score_count(adapter_name):
            return torch.ones(self.shape, dtype=torch.bool, device=self.weight.device)
        last = self._thresholds.setdefault(adapter_name, LastThreshold())
        return spread(self.granularity[adapter_name].units(self.ranking(adapter_name), kept, last), block)

    def _updated(self, name: str, matrix: torch.Tensor) -> torch.Tensor:
        """The matrix with the adapter's update, in the dtype of the matrix."""
        return (matrix + self.update[name]).to(matrix.dtype) if name in self.update else matrix
