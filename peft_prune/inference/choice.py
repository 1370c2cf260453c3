"""Which form of a weight is fastest: measured, in pairs that take turns."""

from __future__ import annotations

import logging
import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Optional

import torch
from torch import nn

from . import semi_structured
from .csr import CPU_DTYPES, CSRKernel
from .semi_structured import SemiStructuredKernel
from .sparse_linear import Kernel, SparseLinear, out_in


logger = logging.getLogger(__name__)

Timer = Callable[[Callable[[], Any]], float]
# CSR reads an index for each weight and uses little of the vector units: it was never near dense above this.
MAX_CSR_DENSITY = 0.5
# 32 rows of BERT-base's activations, wide ones too, stay in the L2 cache of common CPUs.
ROWS_AT_ONCE = 32
PAIRS = 9
SECONDS_PER_SAMPLE = (2e-3, 2e-2)  # at least, and at most if one call allows it
# Layers are called in turn, so that their weights pass through the caches as they do in a model. None holds more.
MAX_TRAFFIC = 128 * 2**20


@dataclass(frozen=True)
class Choice:
    """The fastest form (`"dense"` has no kernel) and the dense layer's time over its time, lowest over `tokens`."""

    form: str
    speed_up: float
    rows_at_once: Optional[int] = None

    def convert(self, layer: nn.Module) -> SparseLinear:
        """A dense layer in this form, which is not `"dense"`."""
        return SparseLinear(layer, self._kernel(out_in(layer)))

    def _kernel(self, weight: torch.Tensor) -> Kernel:
        return SemiStructuredKernel(weight) if self.form == "2:4" else CSRKernel(weight, self.rows_at_once)


def candidates(weight: torch.Tensor, density: float, tokens: Sequence[int]) -> list[Choice]:
    """Sparse forms that could pay for an (out, in) weight where it lies."""
    found = []
    if 0 < density <= MAX_CSR_DENSITY and (weight.device.type != "cpu" or weight.dtype in CPU_DTYPES):
        found.append(Choice("csr", math.nan))
        if max(tokens) > ROWS_AT_ONCE:
            found.append(Choice(f"csr/{ROWS_AT_ONCE}", math.nan, ROWS_AT_ONCE))
    if semi_structured.can_run(weight):
        found.append(Choice("2:4", math.nan))
    return found


def wall_time(call: Callable[[], Any]) -> float:
    """Seconds that a call takes, with what it starts on a GPU."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    start = time.perf_counter()
    call()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start


@torch.no_grad()
def choose(
    layers: Sequence[nn.Module], found: Sequence[Choice], tokens: Sequence[int], margin: float, timer: Timer
) -> Choice:
    """
    Measure the candidates for layers of one kind; dense unless one is clearly faster for each of `tokens`.

    Clearly: in three quarters of the pairs the dense layer takes at least `margin` times as long.

    Args:
        layers (sequence of `nn.Module`): `nn.Linear` or `Conv1D`, of one shape and about one density.
        found (sequence of `Choice`): [`candidates`] for their weights.
        tokens (sequence of `int`): numbers of rows of activations.
        margin (`float`): least ratio of the times.
        timer (function): takes a function without arguments, calls it, returns seconds.
    """
    weight = out_in(layers[0])
    layers = layers[: max(1, MAX_TRAFFIC // weight.nbytes)]
    inputs = [torch.randn(rows, weight.shape[1], device=weight.device, dtype=weight.dtype) for rows in tokens]
    best = Choice("dense", 1.0)
    for candidate in found:
        try:
            sparse = [candidate.convert(layer) for layer in layers]
            if not all(_agree(layers[0](x), sparse[0](x)) for x in inputs):
                logger.warning("%s gives another result than dense for shape %s.", candidate.form, weight.shape)
                continue
            ratios = [time_pairs(layers, sparse, x, timer) for x in inputs]
        except (RuntimeError, NotImplementedError) as error:  # a kernel that this device or shape does not have
            logger.debug("%s does not run for shape %s: %s", candidate.form, tuple(weight.shape), error)
            continue
        speed_up = min(statistics.median(r) for r in ratios)
        clear = all(sorted(r)[len(r) // 4] >= margin for r in ratios)
        if clear and speed_up > best.speed_up:
            best = Choice(candidate.form, speed_up, candidate.rows_at_once)
    return best


def time_pairs(dense: Sequence[nn.Module], sparse: Sequence[nn.Module], x: torch.Tensor, timer: Timer) -> list[float]:
    """Ratios of the times of layers in two forms, of calls that alternate."""
    least, most = SECONDS_PER_SAMPLE
    first = max(timer(lambda: dense[0](x)), 1e-7)
    count = min(len(dense), max(1, int(most / first)))
    repeats = min(200, max(1, math.ceil(least / first / count)))

    def sample(layers: Sequence[nn.Module]) -> float:
        return timer(lambda: [layer(x) for _ in range(repeats) for layer in layers[:count]])

    sample(sparse), sample(dense)
    return [sample(dense) / sample(sparse) for _ in range(PAIRS)]


def _agree(expected: torch.Tensor, got: torch.Tensor) -> bool:
    """Whether two results are equal up to rounding of their dtype."""
    tolerance = 20 * torch.finfo(expected.dtype).eps ** 0.75
    return bool((expected - got).abs().max() <= tolerance * expected.abs().max())
