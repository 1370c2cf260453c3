"""Each sample of a batch through a mask of its own."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Optional

import torch


class SampleNames(list):
    """Names of adapters, one for each sample, and what is known of the rows that a sample has in a layer.

    Args:
        names (`Sequence[str]`): one name for each sample.
        repeats (`int`): how often `generate` repeats each sample.
        sequence_first (`bool`): whether some layers of this model are given (tokens, batch, features).
    """

    def __init__(self, names: Sequence[str], repeats: int = 1, sequence_first: bool = False) -> None:
        super().__init__(names)
        self.repeats = repeats
        self.sequence_first = sequence_first
        self.seen: Optional[tuple[int, int]] = None  # rows and tokens of the model that is at work

    def see(self, rows: int, width: int, choices: bool = False) -> None:
        """Take note of the input of a model: rows and tokens, or samples and choices, each with tokens of its own.

        Raises:
            ValueError: there is not a name for each sample.
        """
        if choices and rows == len(self):
            self.repeats, self.seen = width, None
            return
        if rows not in self.counts:
            raise _wrong_number(len(self), rows)
        self.seen = (rows, width)

    @property
    def counts(self) -> tuple[int, int]:
        """Numbers of rows that are one for each sample, or for each beam or choice of one."""
        return len(self), len(self) * self.repeats

    def repeated(self) -> list[str]:
        """A name for each beam or choice."""
        return [name for name in self for _ in range(self.repeats)]

    def of_rows(self, x: torch.Tensor) -> list[str]:
        """The name of each row of a layer's input.

        Raises:
            ValueError: rows are not samples, or may not be.
        """
        rows = x.shape[0]
        if self.seen is not None and len(set(self)) == 1:
            return [self[0]] * rows  # whatever they are
        flat = x.dim() == 2 and x.is_floating_point()
        if self.sequence_first and not flat and x.shape[1] in self.counts:
            raise _not_certain(x)
        times, rest = divmod(rows, len(self))
        known = flat and not self.sequence_first and self.seen is not None and math.prod(self.seen) == rows
        if rest or not (rows in self.counts or known):
            raise _wrong_number(len(self), rows)
        # beams and choices lie side by side, and so do the tokens of a sample where a model flattens batch and tokens
        return [name for name in self for _ in range(times)]


def _wrong_number(names: int, rows: int) -> ValueError:
    return ValueError(
        "Length of `adapter_names` should be the same as the number of inputs, but got "
        f"{names} and {rows} respectively. If `generate` repeats samples, pass it num_beams or num_return_sequences."
    )


def _not_certain(x: torch.Tensor) -> ValueError:
    return ValueError(
        f"Cannot pass `adapter_names` here: some layers of this model have tokens first and samples second, and an "
        f"input of shape {tuple(x.shape)} may be either. Pass the samples of each adapter in a batch of its own, after "
        "model.set_adapter(...)."
    )


def forward_by_sample(layer: Any, x: torch.Tensor, adapter_names: list[str]) -> torch.Tensor:
    """Apply a layer to a batch whose sample i goes through adapter `adapter_names[i]`.

    Raises:
        ValueError: adapters are merged, there is not a name for each sample, or rows of the input may not be samples.
    """
    if layer.merged:
        raise ValueError(
            "Cannot pass `adapter_names` when there are merged adapters, please call `unmerge_adapter` first."
        )
    asked = adapter_names if isinstance(adapter_names, SampleNames) else SampleNames(adapter_names)
    names = asked.of_rows(x)
    result: Optional[torch.Tensor] = None
    for name in dict.fromkeys(adapter_names):
        weight = layer.weight
        if name in layer.host and layer.has_mask(name):
            weight = layer._as_matrix(layer.applied(name, layer._as_matrix(weight)))
        rows = torch.tensor([i for i, other in enumerate(names) if other == name], device=x.device)
        part = layer._apply_weight(x[rows], weight)
        if result is None:
            result = part.new_empty((len(x), *part.shape[1:]))
        result[rows] = part
    assert result is not None
    return result
