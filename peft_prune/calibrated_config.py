"""The configuration of methods whose masks are found at calibration, without training."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Optional

from .config import PruningConfig
from .config_checks import check_whole


@dataclass
class CalibratedConfig(PruningConfig):
    """
    What methods that look at inputs are told beside [`PruningConfig`]: how many.

    Args:
        num_samples (`int`): examples that [`peft_prune.calibrate`] looks at.
        seed (`int`): seed of what is drawn at random.

    Raises:
        ValueError: a field is out of range or contradicts another one; the message names field, value and fix.
    """

    num_samples: int = field(default=128, metadata={"help": "Examples that calibration looks at."})
    seed: int = field(default=0, metadata={"help": "Seed of what is drawn at random."})

    def __post_init__(self, density: Optional[float] = None):
        super().__post_init__(density)
        check_whole("num_samples", self.num_samples, 1)
        check_whole("seed", self.seed, 0)
