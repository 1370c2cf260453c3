"""Top-k of scores that have moved little since the last time: only those around the last threshold are ranked."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Optional

import numpy as np


@dataclass
class LastThreshold:
    """The smallest score that a matrix kept last time, which tells where to look for the next one.

    Args:
        value (`float`, *optional*): the `k`-th largest score, `None` before the first selection.
        reach (`float`): how far from it the next one is looked for; 0 as long as nothing tells how far it moves.
    """

    value: Optional[float] = None
    reach: float = 0.0

    def note(self, value: float) -> None:
        """Take a threshold that was found."""
        self.reach = 0.0 if self.value is None else 2 * abs(value - self.value)
        self.value = value

    def select(self, values: np.ndarray, k: int) -> Optional[np.ndarray]:
        """Mask of the `k` largest entries if that needs no look at those far from the threshold.

        What is found is checked by counting, so it is exact or `None`.

        Args:
            values (`np.ndarray`): float, one dimension.
            k (`int`): how many to keep, between 1 and `len(values) - 1`.

        Returns:
            `np.ndarray`, *optional*: bool, exactly `k` entries `True`. `None` if the threshold lies elsewhere, or more
                entries share it than there is room for, or some that might be above it are NaN.
        """
        if self.value is None or not self.reach:
            return None
        with np.errstate(over="ignore"):
            mask = values > self.value + self.reach
            # neither above nor below, which NaN is not either
            around = np.flatnonzero(~(mask | (values < self.value - self.reach)))
        room = k - int(np.count_nonzero(mask))
        if not 0 < room <= len(around):
            return None
        near = values[around]
        threshold = np.partition(near, len(near) - room)[len(near) - room]
        chosen = near >= threshold
        if np.count_nonzero(chosen) != room or np.isnan(near).any():
            return None
        mask[around] = chosen
        self.note(float(threshold))
        return mask
