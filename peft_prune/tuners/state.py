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
from .distributed import mask_unknown
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
        self.progress[name] = torch.tensor([-1, 0, kept], dtype=torch.int64, device=matrix.device)
        self.penalty_grad[name] = torch.zeros((), dtype=torch.float32, device=matrix.device)

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

    def keep_mask(self, adapter_name: str) -> None:
        """Take the mask that was computed last for the current one, although scores have moved on."""
        if adapter_name in self._masks:
            sources = self._mask_sources(adapter_name)
            self._masks[adapter_name] = (sources, [version(t) for t in sources], self._masks[adapter_name][2])

    def kept(self, adapter_name: str) -> int:
        """Number of weights that the adapter keeps at present."""
        if adapter_name in self.mask:
            return int(self.pruning_config[adapter_name].mask_info[self.module_name]["kept"])  # type: ignore[index]
        if adapter_name not in self.progress:  # not calibrated yet
            return self.shape[0] * self.shape[1]
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

    def get_mask(self, adapter_name: str) -> torch.Tensor:
        """Mask in force: bool, shape (out, in)."""
        return unpack_bits(self.mask_bits(adapter_name), self.shape)

    def mask_bits(self, adapter_name: str) -> torch.Tensor:
        """Mask in force, packed: uint8, one dimension. Computed anew only when what it follows from has changed."""
        if torch.compiler.is_compiling() and adapter_name in self._masks:
            # `update_schedule` has computed it: nothing here to trace, and tensor versions cannot be
            return self._masks[adapter_name][2]
        return self._current_mask(adapter_name)

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
    @torch.inference_mode(False)  # a mask that is found there may be needed for training
    @torch.no_grad()
    def _current_mask(self, adapter_name: str) -> torch.Tensor:
        sources = self._mask_sources(adapter_name)
        if not sources:
            raise ValueError(self.pruning_config[adapter_name].without_mask)
        versions = [version(t) for t in sources]
        cached = self._masks.get(adapter_name)
        if cached is not None and cached[1] == versions:
            # held by the cache, so an identity cannot be somebody else's
            if all(old is new for old, new in zip(cached[0], sources, strict=True)):
                return cached[2]
        if adapter_name in self.mask and torch.compiler.is_compiling():  # torch.export, whose tensors are fake
            raise RuntimeError(
                f"The mask of {self.module_name!r} has not been unpacked yet. Call the model once before torch.export."
            )
        mask = pack_bits(self._compute_mask(adapter_name))
        self._masks[adapter_name] = (sources, versions, mask)
        return mask

    def _mask_sources(self, adapter_name: str) -> tuple[torch.Tensor, ...]:
        """What the mask follows from: it is computed anew when one of these changes."""
        if adapter_name in self.shards and adapter_name not in self.mask:
            return (*self.shards[adapter_name], self.progress[adapter_name])
        kinds = ("mask",) if adapter_name in self.mask else (*self.score_names, "update", "progress")
        holders = [self.held(kind) for kind in kinds]
        return tuple(holder[adapter_name] for holder in holders if adapter_name in holder)

    def _compute_mask(self, adapter_name: str) -> torch.Tensor:
        config = self.pruning_config[adapter_name]
        if adapter_name in self.mask:
            info = (config.mask_info or {})[self.module_name]
            return load_mask(self.module_name, self.mask[adapter_name], info, config.mask_format)
        if adapter_name in self.shards and not self.is_whole:
            raise mask_unknown(self.module_name)
        if self.merged and config.needs_weights:
            raise ValueError(
                f"The mask of {adapter_name!r} follows from the weight of {self.module_name!r}, into which "
                f"{self.merged_adapters} are merged. Call model.unmerge_adapter() first."
            )
        if config.from_existing_zeros:
            return self.matrix != 0
        block = self.block(adapter_name)
        kept = self.kept_unread(adapter_name) // (block[0] * block[1])
        last = self._thresholds.setdefault(adapter_name, LastThreshold())
        return spread(self.granularity[adapter_name].units(self.ranking(adapter_name), kept, last), block)

    def _updated(self, name: str, matrix: torch.Tensor) -> torch.Tensor:
        """The matrix with the adapter's update, in the dtype of the matrix."""
        return (matrix + self.update[name]).to(matrix.dtype) if name in self.update else matrix
