"""A sample of the tokens of a stream."""

from __future__ import annotations

import torch


class TokenReservoir:
    """A uniform sample, without replacement, of the tokens of a stream of batches whose length is not known.

    Every token draws a random number; those with the largest numbers are in the sample.

    Args:
        size (`int`): tokens in the sample.
        seed (`int`): seed of the draw.
    """

    def __init__(self, size: int, seed: int) -> None:
        self.size = size
        self._generator = torch.Generator().manual_seed(seed)
        self._keys = torch.empty(0)

    def __len__(self) -> int:
        return len(self._keys)

    def offer(self, counts: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Offer the tokens of a batch.

        Args:
            counts (`torch.Tensor`): bool, any shape: which tokens count.

        Returns:
            `tuple[torch.Tensor, torch.Tensor]`: flat positions of the tokens taken, and the slots that they take; both
            int64 of the same length.
        """
        tokens = counts.flatten().nonzero().flatten()
        keys = torch.rand(len(tokens), generator=self._generator, dtype=torch.float64)
        filled = len(self._keys)
        everyone = torch.cat([self._keys.double(), keys])
        best = everyone.topk(min(self.size, len(everyone))).indices
        stay, new = best[best < filled], best[best >= filled]
        taken = torch.ones(len(best), dtype=torch.bool)
        taken[stay] = False  # slots never exceed the size, so the stayers keep theirs
        slots = taken.nonzero().flatten()
        self._keys = torch.cat([self._keys.double(), torch.zeros(len(best) - filled)])
        self._keys[slots] = everyone[new]
        return tokens[new - filled], slots
