"""The configuration of methods whose masks are found at calibration, without training."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Optional

from .config import PruningConfig
from .config_checks import check_single_weights, check_sparsity_pattern, check_whole


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


@dataclass
class OneShotConfig(CalibratedConfig):
    """
    What methods that prune weights layer by layer are told beside [`CalibratedConfig`].

    Args:
        granularity (`str`): `"weight"`, or an n:m pattern such as `"2:4"`: n of every m weights along the input.
        sparsity_pattern (`dict[str, float]`, *optional*): sparsity of single modules, by name or regular expression.

    Raises:
        ValueError: a field is out of range or contradicts another one; the message names field, value and fix.
    """

    granularity: str = field(default="weight", metadata={"help": "'weight', or n:m such as '2:4'."})
    sparsity_pattern: Optional[dict[str, float]] = field(
        default_factory=dict, metadata={"help": "Sparsity of single modules, by name or regular expression."}
    )

    def __post_init__(self, density: Optional[float] = None):
        super().__post_init__(density)
        check_single_weights(self.granularity)
        check_sparsity_pattern(self.sparsity_pattern, "It is the share of weights removed, e.g. sparsity=0.5.")
        if ":" in self.granularity and self.sparsity_pattern:
            raise ValueError(
                f"granularity={self.granularity!r} fixes the sparsity of every matrix, so sparsity_pattern="
                f"{self.sparsity_pattern!r} must stay at its default."
            )
