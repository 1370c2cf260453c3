"""What calibration notes of the inputs of layers, in memory that does not grow with the data."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any, Optional

import torch

from ..solvers.checks import all_finite
from ..solvers.gram import add_triangle, loss, mirror_triangle
from .checks import NO_TOKENS
from .reservoir import TokenReservoir


Counts = Sequence[Optional[torch.Tensor]]  # of encoder and decoder: bool, (batch, tokens): which are no padding


class Observer:
    """Takes notes of what comes into layers, batch by batch.

    Attributes:
        tokens (`dict[str, int]`): tokens that are no padding, by name of the layer that saw them.
    """

    def __init__(self) -> None:
        self.tokens: dict[str, int] = {}

    def needed(self, inputs: int) -> int:
        """Tokens with which notes begin to say something of a layer with so many inputs."""
        return 1

    def start(self, counts: Counts) -> None:
        """Begin a batch.

        Args:
            counts: which tokens of the encoder (or of a model that has one side) and of the decoder are no padding.
        """
        self.counts = [None if c is None else c.cpu() for c in counts]

    def see(self, key: str, decoder: bool, x: torch.Tensor) -> None:
        """Take note of an input of a layer: floating point, shape (..., features).

        Args:
            key (`str`): name of the layer.
            decoder (`bool`): whether it sees the decoder's tokens.
            x (`torch.Tensor`): the input.
        """
        raise NotImplementedError

    def output_loss(self, matrix: torch.Tensor, adapted: torch.Tensor, seen: Any) -> Optional[float]:
        """Relative loss of a layer's output, `None` if what is noted does not say it.

        Args:
            matrix (`torch.Tensor`): the layer's matrix, shape (out, in).
            adapted (`torch.Tensor`): what became of it, the same shape.
            seen: the layer's result.
        """
        return None

    def result(self, key: str) -> Any:
        """What was noted of a layer; it is forgotten here.

        Raises:
            ValueError: the layer has seen nothing but padding, or values that are not finite.
        """
        raise NotImplementedError

    def count(self, key: str, tokens: int) -> None:
        """Note that a layer saw so many tokens that are no padding."""
        self.tokens[key] = self.tokens.get(key, 0) + tokens

    def forget(self, key: str) -> None:
        """Forget how many tokens a layer saw, and raise `ValueError` if there were none."""
        if not self.tokens.get(key):
            what = "saw no token that is no padding" if key in self.tokens else "was not called"
            raise ValueError(
                f"calibrate: {key!r} {what}, so nothing is known about its inputs. Give more batches, or remove it "
                "from target_modules."
            )
        del self.tokens[key]

    def side(self, decoder: bool) -> torch.Tensor:
        """Which tokens count for a layer: bool, (batch, tokens). A model with one side gives what it has."""
        counts = self.counts[1] if decoder and self.counts[1] is not None else self.counts[0]
        assert counts is not None
        return counts

    def real(self, key: str, decoder: bool, x: torch.Tensor) -> torch.Tensor:
        """The tokens of an input that are no padding: shape (tokens, features).

        Raises:
            ValueError: the layer saw other tokens than the batch has, and some of those are padding.
        """
        flat = x.detach().flatten(0, -2)
        # a layer may see the other side's tokens, as the keys and values of cross-attention do
        sides = (self.side(decoder), self.side(not decoder))
        counts = next((c for c in sides if c.shape == x.shape[:-1] or c.numel() == len(flat)), None)
        # an input whose first dimension is not the batch holds no tokens, such as DeBERTa's relative positions
        of_batch = x.dim() < 3 or x.shape[0] == len(sides[0])
        if counts is None and of_batch and not all(bool(c.all()) for c in self.counts if c is not None):
            raise ValueError(
                f"calibrate: {key!r} saw {len(flat)} tokens where the batch has {self.side(decoder).numel()}, so "
                "padding cannot be separated from text. Calibrate with texts of one length, truncated instead of "
                "padded."
            )
        if counts is not None and not bool(counts.all()):
            flat = flat[counts.flatten().to(flat.device)]
        return flat


class InputNorms(Observer):
    """`‖x_j‖₂` of each input j over all tokens that are no padding: float32, shape (in,), on the CPU."""

    def __init__(self) -> None:
        super().__init__()
        self._squares: dict[str, torch.Tensor] = {}

    def needed(self, inputs: int) -> int:
        """32, where a norm is known to about an eighth."""
        return 32

    def see(self, key: str, decoder: bool, x: torch.Tensor) -> None:
        """Add the squares of an input."""
        flat = self.real(key, decoder, x).float()
        self.count(key, len(flat))
        squares = flat.square().sum(0).cpu()
        self._squares[key] = self._squares[key] + squares if key in self._squares else squares

    def result(self, key: str) -> torch.Tensor:
        """The norms."""
        self.forget(key)
        norms = self._squares.pop(key).sqrt()
        check_finite(key, norms)
        return norms


class GramMatrices(Observer):
    """`XᵀX` over all tokens that are no padding: shape (in, in), on the device of the inputs.

    Layers that are given one and the same tensor, as queries, keys and values are, share one matrix: do not change it.

    Args:
        dtype (`torch.dtype`): float32 or float64, whatever the dtype of the model.
    """

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.dtype = dtype
        self._sums: dict[str, torch.Tensor] = {}  # by the layer that sees a tensor first: one triangle
        self._led: Counter[str] = Counter()  # how often each did
        self._followed: dict[str, tuple[str, int]] = {}  # by the others: whom they follow, and how often
        self._waiting: set[str] = set()  # layers whose result was not asked for
        self._last: Optional[tuple[torch.Tensor, int, bool, str, int]] = None  # an input, who saw it first, its tokens

    def needed(self, inputs: int) -> int:
        """As many as inputs: with fewer the matrix is singular."""
        return inputs

    def start(self, counts: Counts) -> None:
        """Begin a batch."""
        super().start(counts)
        self._last = None

    def see(self, key: str, decoder: bool, x: torch.Tensor) -> None:
        """Add the product of an input with itself, or note that another layer's product has it in it."""
        last = self._last
        if last is not None and last[0] is x and last[1:3] == (x._version, decoder) and self._follows(key, last[3]):
            self.count(key, last[4])
            return
        flat = self.real(key, decoder, x)
        self.count(key, len(flat))
        if key not in self._sums:
            self._sums[key] = torch.zeros(x.shape[-1], x.shape[-1], dtype=self.dtype, device=x.device)
        add_triangle(self._sums[key], flat)
        self._led[key] += 1
        self._waiting.add(key)
        self._last = (x, x._version, decoder, key, len(flat))

    def _follows(self, key: str, leader: str) -> bool:
        """Whether a layer's input is in the product of another, in all batches so far."""
        known, times = self._followed.get(key, (leader, 0))
        if known != leader or times != self._led[leader] - 1:
            return False
        self._followed[key] = (leader, times + 1)
        self._waiting.add(key)
        return True

    def result(self, key: str) -> torch.Tensor:
        """The Gram matrix.

        Raises:
            ValueError: as for every observer; or the layer had another one's input in some batches only.
        """
        self.forget(key)
        leader, times = self._followed.pop(key, (key, self._led[key]))
        if times != self._led[leader]:
            raise ValueError(
                f"calibrate: {key!r} and {leader!r} have the same input in some batches but not in others, so their "
                "statistics cannot be separated. Remove one of them from target_modules."
            )
        grams = [self._sums[name] for name in {leader, key} if name in self._sums]
        gram = mirror_triangle(grams[0]) if len(grams) == 1 else mirror_triangle(grams[0] + grams[1])
        self._waiting.remove(key)
        self._last = None
        if not self._waiting:
            self._sums, self._led, self._followed = {}, Counter(), {}
        check_finite(key, gram)
        return gram

    def output_loss(self, matrix: torch.Tensor, adapted: torch.Tensor, seen: torch.Tensor) -> float:
        """`tr((Ŵ − W) G (Ŵ − W)ᵀ) / tr(W G Wᵀ)`."""
        return loss(matrix, adapted, seen)


def check_finite(key: str, values: torch.Tensor) -> None:
    """Raise `ValueError` if what a layer saw is not finite."""
    if not all_finite(values):
        raise ValueError(
            f"calibrate: the input of {key!r} is not finite. The base model seems to be broken, or its activations are "
            "too large for its dtype: load it in bfloat16 or float32 instead of float16."
        )


class TokenSample(Observer):
    """Inputs at the same sampled tokens in all layers: float32, shape (tokens, features), on the CPU.

    Args:
        size (`int`): tokens in the sample.
        seed (`int`): seed of the sample.
    """

    def __init__(self, size: int, seed: int) -> None:
        super().__init__()
        self.size = size
        self._reservoirs = [TokenReservoir(size, seed), TokenReservoir(size, seed)]
        self._offers: list[tuple[torch.Tensor, torch.Tensor, int]] = []
        self._stored: dict[str, list[torch.Tensor]] = {}
        self._calls: dict[str, int] = {}
        self._decoder: dict[str, bool] = {}

    def start(self, counts: Counts) -> None:
        """Draw the tokens of a batch that are in the sample, for both sides."""
        super().start(counts)
        first, *others = [
            None if c is None else (*reservoir.offer(c), c.numel())
            for reservoir, c in zip(self._reservoirs, self.counts, strict=True)
        ]
        assert first is not None
        self._offers = [first, *(first if other is None else other for other in others)]
        self._calls = {}

    def see(self, key: str, decoder: bool, x: torch.Tensor) -> None:
        """Keep the rows of the sampled tokens. A shared layer is called several times in a forward pass."""
        positions, slots, tokens = self._offers[decoder]
        flat = x.detach().flatten(0, -2)
        if len(flat) != tokens:
            raise ValueError(
                f"A layer saw {len(flat)} tokens where the batch has {tokens}, so padding cannot be separated from "
                "text. Use an attn_implementation that does not unpad, such as 'sdpa'."
            )
        stored, call = self._stored.setdefault(key, []), self._calls.get(key, 0)
        if call == len(stored):
            stored.append(torch.zeros(self.size, flat.shape[1]))
        stored[call][slots] = flat[positions.to(flat.device)].float().cpu()
        self._calls[key], self._decoder[key] = call + 1, decoder

    def result(self, key: str) -> torch.Tensor:
        """The sample."""
        tokens = len(self._reservoirs[self._decoder.get(key, False)]) or len(self._reservoirs[0])
        if not tokens:
            raise ValueError(NO_TOKENS)
        sample = torch.cat([part[:tokens] for part in self._stored.pop(key)])
        check_finite(key, sample)
        return sample
