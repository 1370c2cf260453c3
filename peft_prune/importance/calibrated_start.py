"""Where scores start that have looked at inputs: at the ranking of Wanda, or at that of SparseGPT."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from ..calibration.observers import GramMatrices, InputNorms, Observer
from ..selection.granularity import pool
from ..solvers.gram import cholesky, damped


_LEAST = -20.0  # standard deviations: what a weight starts at that is zero, or whose input is; it never comes back
_DAMPING = 0.01
_CONSTANT = 1e-6  # a spread below is rounding


@dataclass(frozen=True)
class CalibratedStart:
    """Scores that start at `standardised(log(|W_ij|·c_j))`, with a factor `c_j` for each input.

    The mask of the largest is that of the method it is named after, and the distances between scores do not depend on
    the scale of weights or inputs, so one learning rate fits all rows. What has to be kept are the factors: scores can
    be computed from them and the weight again.

    Args:
        kind (`str`): `"wanda"`: `c_j = ‖x_j‖₂` (Sun et al. 2023, eq. 1). `"sparsegpt"`: `c_j = 1/√[G⁻¹]_jj`, what the
            output loses if all other weights of the row make up (Frantar & Alistarh 2023, eq. 3).
    """

    kind: str

    @property
    def is_light(self) -> bool:
        """Whether notes of all layers at once take next to no memory."""
        return self.kind == "wanda"

    def observer(self) -> Observer:
        """What calibration has to note of a layer's inputs."""
        return InputNorms() if self.kind == "wanda" else GramMatrices()

    def factors(self, seen: Any) -> torch.Tensor:
        """What magnitudes are multiplied with, of what was noted: float32, shape (in,), on the CPU.

        Raises:
            ValueError: the damped Gram matrix is not positive definite.
        """
        if self.kind == "wanda":
            return seen.float().cpu()
        inverse = torch.cholesky_inverse(cholesky(damped(seen, _DAMPING)))
        factors = inverse.diagonal().rsqrt()
        return torch.where(seen.diagonal() > 0, factors, 0.0).float().cpu()


CALIBRATED_STARTS = {kind: CalibratedStart(kind) for kind in ("wanda", "sparsegpt")}


def calibrated_scores(matrix: torch.Tensor, factors: torch.Tensor, block: tuple[int, int] = (1, 1)) -> torch.Tensor:
    """Scores before training: `log(|W_ij|·c_j)`, summed over a block before the logarithm, and standardised.

    Each row of scores has mean 0 and standard deviation 1; where rows hold a single one, all of them together have.
    Zeros do not count, and start far below everything else.

    Args:
        matrix (`torch.Tensor`): the weight, floating point, shape (out, in).
        factors (`torch.Tensor`): see [`CalibratedStart.factors`].
        block (`tuple[int, int]`): rows and columns that share a score.

    Returns:
        `torch.Tensor`: float32, shape (out / rows, in / columns), on the device of `matrix`.
    """
    size = pool(matrix.detach().float().abs() * factors.to(matrix.device), block)
    groups = size.view(1, -1) if size.shape[1] == 1 else size
    logs, counted = groups.log(), groups > 0
    count = counted.sum(1, keepdim=True).clamp(min=1)
    mean = torch.where(counted, logs, 0.0).sum(1, keepdim=True) / count
    logs -= mean
    spread = (torch.where(counted, logs, 0.0).square_().sum(1, keepdim=True) / count).sqrt_()
    logs /= torch.where(spread > _CONSTANT, spread, torch.ones_like(spread))
    return logs.clamp_(min=_LEAST).view_as(size)
