"""Configuration of SMP."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Union

from peft.utils import PeftType

from ...config import PruningConfig


@dataclass
class SMPConfig(PruningConfig):
    """
    Configuration of Static Model Pruning (Jiang et al. 2023), which learns which weights of a frozen model to keep.

    The fields are those of [`PruningConfig`]. `allocation="score"` is the paper's SMP-S, `"local"` its SMP-L. The
    defaults are the paper's: sparsity grows on a cubic over the first 60 % of training, the penalty on a cubic over all
    of it to 400, scores learn at 2e-2. One is not: scores start at `|W| / std(W)`, since from 0 (`score_init="zeros"`,
    the paper's) a short training does not get away from the noise of its first steps.

    Example:

        ```py
        >>> from peft_prune import SMPConfig

        >>> config = SMPConfig(task_type="SEQ_CLS", sparsity=0.9, allocation="score")
        ```
    """

    penalty: float = field(default=400.0, metadata={"help": "Final weight of the penalty on the scores."})
    score_init: Union[str, float] = field(
        default="magnitude", metadata={"help": "'magnitude', 'zeros' (the paper's) or 'random'."}
    )

    def __post_init__(self, density=None):
        super().__post_init__(density)
        self.peft_type = PeftType("SMP")
