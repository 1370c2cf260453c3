"""Scores of low rank: what a matrix starts from, plus factors that are as few numbers as those of a LoRA."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Optional

import torch
from torch import nn

from .calibrated_start import calibrated_scores
from .learned import Learned
from .penalty import sigmoid_penalty_grad
from .start import initial_scores, spread_of


@dataclass(frozen=True)
class LowRank(Learned):
    """Learned scores that are held as factors, see [`Start.scores`].

    Args:
        start (`str` or `float`): where scores start.
        rank (`int`): rank of the factors.
        random (`bool`): whether the factors start at random, for tests; otherwise the scores start at `start`.
    """

    rank_of_factors: int = 7
    random: bool = False

    label = "learned score of low rank"
    tensors = ("scores_A", "scores_B")
    needs_weights = True

    def add(self, layer: Any, name: str) -> None:
        """`scores_A` (rows, rank + 1) and `scores_B` (rank + 1, columns), float32.

        With a calibrated start also its factors, `start` (in,), whose 32 bits are held as whole numbers: PEFT would
        cast floats to the dtype of the base.

        Raises:
            ValueError: the rank is not below the smaller side of the scores.
        """
        self.check_inputs(layer)
        block = layer.block(name)
        shape = (layer.shape[0] // block[0], layer.shape[1] // block[1])
        if self.rank_of_factors >= min(shape):
            raise ValueError(
                f"score_rank={self.rank_of_factors!r} must be less than the smaller side of the {shape} scores of "
                f"{layer.module_name!r}. Use a lower rank, or score='movement'."
            )
        if self.calibrated_start:
            layer.held("start")[name] = torch.zeros(layer.shape[1], dtype=torch.int32, device=layer.weight.device)
        else:
            layer.host[name].start = Start.of(layer.matrix, self.start, block)
        factors = initial_factors(shape, self.rank_of_factors, layer.weight.device, random=self.random)
        for kind, factor in zip(self.tensors, factors, strict=True):
            layer.held(kind)[name] = nn.Parameter(factor)

    def rank(self, layer: Any, name: str) -> torch.Tensor:
        """The scores, computed from their factors."""
        a, b = (layer.held(kind)[name].detach() for kind in self.tensors)
        return self._start(layer, name).scores(layer.matrix, a, b)

    def begin(self, layer: Any, name: str, factors: torch.Tensor) -> None:
        """Keep what scores start from: a number for each input, and none for each weight."""
        layer.held("start")[name].copy_(factors.view(torch.int32))

    def _start(self, layer: Any, name: str) -> Start:
        """Where scores start."""
        if not self.calibrated_start:
            return layer.host[name].start
        return Start(self.start, layer.block(name), 1.0, layer.held("start")[name].view(torch.float32))

    def scores(self, layer: Any, name: str) -> tuple[Optional[torch.Tensor], Optional[torch.Tensor]]:
        """A stand-in for the scores, which hands their gradient on to the factors, penalty included."""
        a, b = (layer.held(kind)[name] for kind in self.tensors)
        start = self._start(layer, name)
        return LowRankScores.apply(a, b, layer.matrix, start, layer.take_penalty(name, a)), None


@dataclass(frozen=True)
class Start:
    """Where the scores of a matrix start: recomputed from the frozen weight whenever they are needed.

    Args:
        kind (`str` or `float`): the config's `score_init`.
        block (`tuple[int, int]`): rows and columns that share a score.
        scale (`float`): what the magnitudes are multiplied with.
        factors (`torch.Tensor`, *optional*): of a calibrated start: float32, shape (in,).
    """

    kind: str | float
    block: tuple[int, int]
    scale: float
    factors: Optional[torch.Tensor] = None

    @classmethod
    def of(cls, matrix: torch.Tensor, kind: str | float, block: tuple[int, int]) -> Start:
        """For a weight (out, in)."""
        if kind != "magnitude":
            return cls(kind, block, 1.0)
        if matrix.is_meta:
            raise ValueError(
                "score='low_rank' starts from the base weights, which are on device 'meta'. Load them first."
            )
        return cls(kind, block, 1.0 / float(spread_of(matrix)))

    def scores(self, matrix: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        """`S = S₀ + A·B + r·1ᵀ + 1·cᵀ` (PST, Li et al. 2022; its `α|W|` is `S₀` of `score_init="magnitude"`).

        Args:
            matrix (`torch.Tensor`): the weight, floating point, shape (out, in).
            a (`torch.Tensor`): float, shape (rows, rank + 1): `A`, and in the last column `r`, a number for each row.
            b (`torch.Tensor`): float, shape (rank + 1, columns): `B`, and in the last row `c`, one for each column.

        Returns:
            `torch.Tensor`: float, shape (rows, columns).
        """
        if self.factors is not None:
            start, factor = calibrated_scores(matrix, self.factors, self.block).to(a.dtype), 1.0
        elif self.kind == "magnitude" and self.block == (1, 1):
            start, factor = matrix.detach().abs().to(a.dtype), self.scale
        else:
            start, factor = initial_scores(matrix, self.kind, self.block).to(a.dtype), 1.0
        # one product, in place
        left = torch.cat([a, torch.ones_like(a[:, :1])], dim=1)
        right = torch.cat([b[:-1], torch.ones_like(b[:1]), b[-1:]])
        with torch.autocast(a.device.type, enabled=False):  # two ranks may not round differently
            return start.addmm_(left, right, beta=factor)


class LowRankScores(torch.autograd.Function):
    """Stands for scores of low rank where a gradient of scores is computed, without holding any.

    Forward gives a view of a single zero, in the shape of the scores, since a mask depends on scores through their
    ranking only. Backward takes the gradient of the scores and gives that of their factors.
    """

    @staticmethod
    def forward(
        ctx: Any,
        a: torch.Tensor,
        b: torch.Tensor,
        matrix: torch.Tensor,
        start: Start,
        penalty: Optional[torch.Tensor],
    ) -> torch.Tensor:
        """Make the stand-in.

        Args:
            ctx: autograd's context.
            a (`torch.Tensor`): see [`Start.scores`], as is `b`.
            b (`torch.Tensor`): shape (rank + 1, columns).
            matrix (`torch.Tensor`): the weight that scores start from, shape (out, in).
            start ([`Start`]): how they start from it.
            penalty (`torch.Tensor`, *optional*): 0-dim, the factor of `σ'(S)` in the gradient of the scores.
        """
        ctx.save_for_backward(a, b, matrix)
        # see MaskedWeight for why the penalty is not among the saved tensors
        ctx.start, ctx.penalty = start, penalty
        return a.new_zeros(()).expand(a.shape[0], b.shape[1])

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[Optional[torch.Tensor], ...]:  # type: ignore[override]
        """Gradients of the factors: `G·Bᵀ` and the sums of its rows, `Aᵀ·G` and the sums of its columns."""
        a, b, matrix = ctx.saved_tensors
        if ctx.penalty is not None:
            grad = sigmoid_penalty_grad(ctx.start.scores(matrix, a, b), ctx.penalty).add_(grad)
        # a column and a row of ones: the sums come with the products
        grad_a = grad @ torch.cat([b[:-1], torch.ones_like(b[:1])]).T
        grad_b = torch.cat([a[:, :-1], torch.ones_like(a[:, :1])], dim=1).T @ grad
        return grad_a, grad_b, None, None, None


def initial_factors(
    shape: tuple[int, int], rank: int, device: torch.device, random: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """Factors before training: as in a LoRA the first is random and the second zero, so that scores are `S₀`.

    Args:
        shape (`tuple[int, int]`): rows and columns of the scores.
        rank (`int`): of `A·B`.
        device (`torch.device`): where they live.
        random (`bool`): whether the second is random as well, and so the scores.

    Returns:
        `tuple[torch.Tensor, torch.Tensor]`: float32, shapes (rows, rank + 1) and (rank + 1, columns).
    """
    a = torch.randn(shape[0], rank + 1, device=device) / rank**0.5
    a[:, -1] = 0
    b = torch.zeros(rank + 1, shape[1], device=device)
    return a, torch.randn_like(b) if random else b
