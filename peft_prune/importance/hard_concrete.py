"""The hard concrete gate of L0 regularisation (Louizos et al. 2018; movement pruning, appendix)."""

from __future__ import annotations

import math
import zlib
from dataclasses import dataclass
from typing import Any, Optional

import torch

from ..selection.granularity import spread
from .learned import Learned
from .straight_through import Penalized


GAMMA, ZETA, BETA = -0.1, 1.1, 2 / 3
# a gate is above 0 after training where its score is above this
OPEN_ABOVE = math.log(-GAMMA / ZETA)
# the probability that a gate is not 0 in training is sigmoid(S - PENALTY_OFFSET)
PENALTY_OFFSET = BETA * math.log(-GAMMA / ZETA)


def hard_concrete(scores: torch.Tensor, noise: Optional[torch.Tensor] = None) -> torch.Tensor:
    """Gates between 0 and 1, differentiable in the scores.

    `clamp(s·(ζ − γ) + γ, 0, 1)` with `s = sigmoid((log u − log(1 − u) + S) / β)` in training and `sigmoid(S)` after.

    Args:
        scores (`torch.Tensor`): floating point, any shape.
        noise (`torch.Tensor`, *optional*): `u`, uniform in (0, 1), the same shape; `None` after training.
    """
    if noise is not None:
        scores = (noise.log() - (-noise).log1p() + scores) / BETA
    return (scores.sigmoid() * (ZETA - GAMMA) + GAMMA).clamp(0, 1)


def draw_noise(shape: torch.Size, device: torch.device, seed: int) -> torch.Tensor:
    """Uniform in (0, 1), float32: drawn on the CPU, so that every rank and device has the same."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.rand(shape, generator=generator).clamp_(1e-6, 1 - 1e-6)
    # from pinned memory, which a copy does not wait for
    return noise.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else noise.to(device)


@dataclass(frozen=True)
class HardConcrete(Learned):
    """Learned scores that are gates between 0 and 1, with noise in training.

    Args:
        start (`str` or `float`): where scores start.
        seed (`int`): seed of the noise.
    """

    seed: int = 0

    label = "learned gate"
    gates = True
    penalty_offset = PENALTY_OFFSET

    def masked(self, layer: Any, name: str, matrix: torch.Tensor) -> torch.Tensor:
        """The matrix times its gates."""
        scores, penalty = self.scores(layer, name)
        if penalty is not None:
            scores = Penalized.apply(scores, penalty, self.penalty_offset)
        assert scores is not None
        gates = hard_concrete(scores, self.noise(layer, name))
        return matrix * spread(gates, layer.block(name)).to(matrix.dtype)

    def settled(self, layer: Any, name: str, matrix: torch.Tensor) -> torch.Tensor:
        """The matrix times its gates without noise, as long as there are gates."""
        if name not in layer.progress:
            return super().settled(layer, name, matrix)
        gates = hard_concrete(layer.held("scores")[name])
        return matrix * spread(gates, layer.block(name)).to(matrix.dtype)

    def noise(self, layer: Any, name: str) -> Optional[torch.Tensor]:
        """Noise of the gates, in training only; the same on all ranks, another for each layer and step."""
        if not layer.training:  # without gradients, too: reentrant checkpointing begins so
            return None
        seed = zlib.crc32(f"{self.seed}:{layer.steps(name)[0]}:{layer.module_name}".encode())
        scores = layer.held("scores")[name]
        return draw_noise(scores.shape, scores.device, seed)
