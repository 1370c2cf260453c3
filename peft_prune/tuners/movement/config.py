"""Configuration of movement pruning."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, Optional, Union

from peft.utils import PeftType

from ...config import PruningConfig
from ...config_checks import check_choice, check_flag, check_number, check_whole
from ...masks.hard_concrete import OPEN_ABOVE, PENALTY_OFFSET
from ...masks.schedule import Schedule
from ...masks.values import VALUE_DTYPES


# What each variant of the paper is made of (sections 3 and 4, and appendix A.1)
VARIANTS: dict[str, dict[str, Any]] = {
    "hard": {"score": "movement", "mask": "topk", "penalty": 0.0, "score_init": "zeros", "score_lr": 1e-2},
    "soft": {"score": "movement", "mask": "threshold", "penalty": 400.0, "score_init": "zeros", "score_lr": 1e-2},
    "l0": {"score": "movement", "mask": "l0", "penalty": 125.0, "score_init": 2.197, "score_lr": 1e-1},
    "magnitude": {"score": "magnitude", "mask": "topk", "penalty": 0.0, "score_init": "zeros", "score_lr": 1e-2},
}
SCORES, MASKS, UPDATES = ("movement", "low_rank", "magnitude"), ("topk", "threshold", "l0"), ("full", "none")


@dataclass
class MovementPruningConfig(PruningConfig):
    """
    Configuration of movement pruning (Sanh et al. 2020), which fine-tunes weights while it learns which ones to keep.

    The base model is not touched: the adapter holds the change of its weights, and in the end the mask and the kept
    values. `variant` sets the fields that are not given as the paper does; those of [`PruningConfig`] apply too.

    Args:
        variant (`str`):
            `"hard"`: the weights with the largest learned scores stay, as many as `sparsity` says. `"soft"`: those
            whose score is above a threshold, so that `penalty` decides how many. `"l0"`: gates with noise, whose
            probability is penalised, so that `penalty` decides, too. `"magnitude"`: the weights with the largest
            magnitude stay, recomputed as they are trained.
        score (`str`, *optional*):
            `"movement"`, learned; `"low_rank"`, learned as factors (see [`SMPConfig`]); or `"magnitude"`.
        mask (`str`, *optional*):
            `"topk"`, `"threshold"` or `"l0"`: how scores become a mask.
        threshold (`float`):
            τ for `mask="threshold"`: weights with `sigmoid(S) > τ` stay. It rises from 0 on the sparsity's schedule.
        min_density (`float`):
            Share of each matrix that stays in any case with `mask="threshold"`.
        update (`str`):
            `"full"`: kept weights are trained. `"none"`: they stay as they are, which is SMP.
        from_existing_zeros (`bool`):
            Take the mask from the zeros of the base weights instead, and fine-tune what is not zero.
        value_dtype (`str`):
            How kept values are stored: `"float32"`, `"float16"`, `"bfloat16"`, or `"int8"` with a scale for each row.
        seed (`int`):
            Seed of the noise of the gates.

    Example:

        ```py
        >>> from peft_prune import MovementPruningConfig

        >>> config = MovementPruningConfig(variant="hard", task_type="SEQ_CLS", sparsity=0.9)
        ```
    """

    variant: str = field(default="hard", metadata={"help": "'hard', 'soft', 'l0' or 'magnitude'."})
    score: Optional[str] = field(default=None, metadata={"help": "'movement', 'low_rank' or 'magnitude'."})  # type: ignore[misc]
    mask: Optional[str] = field(default=None, metadata={"help": "'topk', 'threshold' or 'l0'."})
    threshold: float = field(default=0.1, metadata={"help": "Threshold of sigmoid(S) for mask='threshold'."})
    min_density: float = field(default=0.005, metadata={"help": "Least share kept of a matrix by a threshold."})  # type: ignore[misc]
    update: str = field(default="full", metadata={"help": "'full' or 'none'."})
    from_existing_zeros: bool = field(default=False, metadata={"help": "Take the mask from the base's zeros."})  # type: ignore[misc]
    value_dtype: str = field(default="float32", metadata={"help": "'float32', 'float16', 'bfloat16' or 'int8'."})  # type: ignore[misc]
    seed: int = field(default=0, metadata={"help": "Seed of the noise of the gates."})
    penalty: Optional[float] = field(default=None, metadata={"help": "Final weight of the penalty on the scores."})  # type: ignore[assignment]
    score_init: Optional[Union[str, float]] = field(default=None, metadata={"help": "Where scores start."})  # type: ignore[assignment]
    score_lr: Optional[float] = field(default=None, metadata={"help": "Learning rate of the scores."})  # type: ignore[assignment]
    schedule_start: float = field(default=0.1, metadata={"help": "Share of training at which sparsity begins to grow."})
    schedule_end: float = field(default=0.8, metadata={"help": "Share of training at which sparsity is final."})

    def __post_init__(self, density=None):
        check_choice("variant", self.variant, tuple(VARIANTS))
        check_flag("from_existing_zeros", self.from_existing_zeros)
        check_whole("seed", self.seed, 0)
        asked = self.penalty
        for name, value in VARIANTS[self.variant].items():
            if getattr(self, name) is None:
                setattr(self, name, value)
        check_choice("score", self.score, SCORES)
        check_choice("mask", self.mask, MASKS)
        check_choice("update", self.update, UPDATES)
        check_choice("value_dtype", self.value_dtype, tuple(VALUE_DTYPES))
        self._check_combination(density)
        if not self.learns_scores:
            self._without_penalty(asked)
        super().__post_init__(density)
        self.peft_type = PeftType("MOVEMENT")
        check_number("threshold", self.threshold, 0.0, 1.0, "The paper uses 0.1.", open_high=True)
        check_number("min_density", self.min_density, 0.0, 1.0, "The paper uses 0.005.")

    def _without_penalty(self, asked: Optional[float]) -> None:
        if asked and not self.finalized:
            why = "from_existing_zeros=True" if self.from_existing_zeros else f"score={self.score!r}"
            raise ValueError(f"penalty={asked!r} has no effect with {why}, which learns no scores. Leave it out.")
        self.penalty = 0.0  # the variant may have set another one

    def _check_combination(self, density: Optional[float]) -> None:
        if self.score == "magnitude" and self.mask != "topk":
            raise ValueError(f"mask={self.mask!r} needs learned scores. Use mask='topk' with score='magnitude'.")
        if self.score == "low_rank" and self.mask == "l0":
            raise ValueError("mask='l0' gives each weight a gate of its own. Use score='movement' with it.")
        if self.score == "low_rank" and self.from_existing_zeros:
            raise ValueError(
                "score='low_rank' has nothing to decide with from_existing_zeros=True. Leave one of them out."
            )
        if self.update == "none" and (self.score == "magnitude" or self.mask == "l0" or self.from_existing_zeros):
            raise ValueError(
                f"update='none' leaves nothing to train, or gates with nowhere to go, with score={self.score!r}, mask="
                f"{self.mask!r}, from_existing_zeros={self.from_existing_zeros!r}. Use update='full'."
            )
        if self.finds_sparsity:
            what = "the zeros of the base decide" if self.from_existing_zeros else "the penalty decides"
            self._refuse_sparsity(density, f"{what} how much is removed. Leave it out.")
        if self.from_existing_zeros and not self.finalized and (self.allocation != "local" or self.sparsity_pattern):
            raise ValueError(
                f"allocation={self.allocation!r} and sparsity_pattern={self.sparsity_pattern!r} have no effect with "
                "from_existing_zeros=True: the zeros of the base decide what each matrix keeps. Leave them out."
            )
        if self.mask != "topk" and (self.allocation != "local" or self.sparsity_pattern or ":" in self.granularity):
            raise ValueError(
                f"mask={self.mask!r} lets scores decide by themselves how much each matrix keeps, so allocation="
                f"{self.allocation!r}, sparsity_pattern={self.sparsity_pattern!r} and granularity={self.granularity!r} "
                "must not fix it. Leave them at their defaults."
            )

    # ------------------------------------------------- what the layer asks for

    @property
    def learns_scores(self) -> bool:
        """Whether scores are trained."""
        return self.score != "magnitude" and not self.from_existing_zeros

    @property
    def updates_weights(self) -> bool:  # type: ignore[override]
        """Whether kept weights are trained."""
        return self.update == "full"

    @property
    def stores_values(self) -> bool:  # type: ignore[override]
        """Whether the final adapter holds the kept values."""
        return self.update == "full"

    @property
    def gated(self) -> bool:  # type: ignore[override]
        """Whether weights are multiplied by gates between 0 and 1 in training."""
        return self.mask == "l0" and self.learns_scores

    @property
    def penalty_offset(self) -> float:  # type: ignore[override]
        """Where the penalty's sigmoid has its middle."""
        return PENALTY_OFFSET if self.gated else 0.0

    @property
    def finds_sparsity(self) -> bool:  # type: ignore[override]
        """Whether the sparsity comes out of training, instead of being given."""
        return self.mask != "topk" or self.from_existing_zeros

    def score_threshold_at(self, step: int, total_steps: int) -> Optional[float]:
        """Score above which weights are kept at a step, `None` if a share of them is kept."""
        if not self.learns_scores or self.mask == "topk":
            return None
        if self.mask == "l0":
            return OPEN_ABOVE
        schedule = Schedule(0.0, self.threshold, self.schedule_start, self.schedule_end, self.sparsity_schedule)
        tau = schedule.at(step, total_steps)
        return math.log(tau / (1 - tau)) if tau > 0 else -math.inf
