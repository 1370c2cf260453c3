"""What ranks whole blocks: the order in which they go."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Optional

import torch
import torch.nn.functional as F
from torch import nn
from transformers.utils.logging import tqdm

from ..calibration.shortened import Shortened, Taken, similarity_of_blocks


class BlockImportance(ABC):
    """Says which blocks go."""

    label: ClassVar[str]

    @abstractmethod
    def least(
        self, model: nn.Module, blocks: Sequence[nn.Module], adds: Sequence[Optional[torch.Tensor]], taken: Taken,
        candidates: Sequence[int], count: int,
    ) -> list[int]:  # fmt: skip
        """Numbers of the blocks that go, in the order in which they do.

        Args:
            model (`nn.Module`): the model, in eval mode.
            blocks (`Sequence[nn.Module]`): its blocks, in order.
            adds (`Sequence[Optional[torch.Tensor]]`): what each block adds to a token when it is gone: its biases.
            taken: inputs of the model, and which of their tokens are no padding.
            candidates (`Sequence[int]`): those that may go, not the first block.
            count (`int`): how many go.
        """


@dataclass(frozen=True)
class BlockInfluence(BlockImportance):
    """Block influence (ShortGPT, Men et al. 2024, arXiv 2403.03853, section 3.1).

    `1 − mean over tokens of cos(what comes into the block, what it puts out)`; the least go.
    """

    label = "influence"

    def least(
        self, model: nn.Module, blocks: Sequence[nn.Module], adds: Sequence[Optional[torch.Tensor]], taken: Taken,
        candidates: Sequence[int], count: int,
    ) -> list[int]:  # fmt: skip
        """As for every importance of blocks."""
        influence = 1 - similarity_of_blocks(model, blocks, taken)
        return sorted(candidates, key=lambda number: float(influence[number]))[:count]


@dataclass(frozen=True)
class BlockLoss(BlockImportance):
    """One block after the other, each time the one without which the model's answers change least.

    Changes are the KL divergence of the model's logits from those of the dense model, mean over tokens; of a model
    without logits, the squared error of its hidden states. The more blocks are gone, the more each other one matters,
    so that what it cost at first is a bound: only those are tried again whose bound is below the best (lazy greedy,
    Minoux 1978).
    """

    label = "loss"

    def least(
        self, model: nn.Module, blocks: Sequence[nn.Module], adds: Sequence[Optional[torch.Tensor]], taken: Taken,
        candidates: Sequence[int], count: int,
    ) -> list[int]:  # fmt: skip
        """As for every importance of blocks."""
        short, order, now = Shortened(model, blocks, adds, taken), [], 0.0
        dense = [_answer(output, real) for output, (_, real) in zip(short.answers(), taken, strict=True)]

        def loss_without(number: int) -> float:
            outputs = zip(dense, short.answers_without(number), taken, strict=True)
            return sum(_distance(answer, output, real) for answer, output, (_, real) in outputs)

        costs = dict.fromkeys(candidates, float("-inf"))
        for _ in tqdm(range(count), desc="calibrate: whole layers", unit="layer"):
            tried: set[int] = set()
            while (best := min(costs, key=lambda number: costs[number])) not in tried:
                costs[best] = loss_without(best) - now
                tried.add(best)
            now += costs.pop(best)
            order.append(best)
            short.removed.add(best)
            if len(order) < count:
                for _ in short.answers():  # what comes into the blocks behind is another thing now
                    pass
        return order


def _answer(output: Any, real: torch.Tensor) -> torch.Tensor:
    """Logits or hidden states of real tokens, or a row for each example: float, shape (rows, width)."""
    logits = getattr(output, "logits", None)
    found = output[0] if logits is None else logits
    found = found[real.to(found.device)] if found.shape[:2] == real.shape else found.flatten(0, -2)
    return found.float().log_softmax(-1) if _is_distribution(output, found) else found.float()


def _is_distribution(output: Any, found: torch.Tensor) -> bool:
    return getattr(output, "logits", None) is not None and found.shape[-1] > 1


def _distance(dense: torch.Tensor, output: Any, real: torch.Tensor) -> float:
    found = _answer(output, real)
    if _is_distribution(output, found):
        return float(F.kl_div(found, dense, reduction="sum", log_target=True))
    return float(F.mse_loss(found, dense, reduction="sum"))
