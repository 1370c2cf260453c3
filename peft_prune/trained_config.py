"""The configuration of methods whose masks are learned: schedule, scores, penalty."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, Optional, Union

from . import doubts
from .config import PruningConfig
from .config_checks import check_allocation, check_schedule, check_sparsity_pattern, check_training
from .importance.base import Importance
from .importance.calibrated_start import CALIBRATED_STARTS
from .importance.learned import Learned
from .importance.low_rank import LowRank
from .selection.curve import Schedule


@dataclass
class TrainedConfig(PruningConfig):
    """
    Fields of methods with a schedule and scores, in addition to those of [`PruningConfig`]: how units compete, how
    sparsity grows, how scores are trained.

    Args:
        sparsity_pattern (`dict[str, float]`, *optional*):
            Sparsity of single modules, by name or regular expression, as LoRA's `rank_pattern`. `allocation` does not
            apply to these modules.
        allocation (`str`):
            How the density is distributed: `"local"` (each matrix has the same), `"row"` (each row of each matrix has
            the same, as in Wanda), `"score"` (matrices of the same kind share theirs by mean score) or `"global"` (one
            threshold for all scores).
        allocation_temperature (`float`, *optional*):
            For `allocation="score"`: scores are divided by it first. By default 1, and 3 for a density of 0.5 or more.
        granularity (`str`):
            What is kept or removed together: `"weight"`; an n:m pattern such as `"2:4"`, two of every four weights
            along the input; a block such as `"32x32"` (out × in); `"row"` or `"column"`, an output or an input of a
            matrix; or `"head"`, the rows or columns of an attention head.
        initial_sparsity (`float`):
            Sparsity at the beginning of training.
        sparsity_schedule (`str`):
            `"cubic"`, `"linear"` or `"constant"`: how sparsity grows from `initial_sparsity` to `sparsity`.
            `"constant"` with `schedule_start=0` begins at the final sparsity.
        schedule_start (`float`):
            Share of training, in [0, 1), at which sparsity begins to grow.
        schedule_end (`float`):
            Share of training, in (0, 1], at which it has reached `sparsity`. It stays there.
        total_steps (`int`, *optional*):
            Number of optimizer steps of the training. `PruningCallback` fills it in.
        penalty (`float`):
            Final weight λ of the penalty on the scores, `λ · mean(sigmoid(S))`. 0 turns it off.
        penalty_schedule (`str`):
            `"cubic"`, `"linear"` or `"constant"`: how λ rises over the whole of training.
        score_init (`str`):
            Initial scores: `"zeros"`, `"magnitude"` (`|W| / std(W)`), `"random"`, or a number for all. `"wanda"` and
            `"sparsegpt"` start at the rankings of these methods, which need inputs: call [`peft_prune.calibrate`] once
            before training, or leave that to `PruningTrainer` or `PruningCallback`. The scores of each row have mean 0
            and standard deviation 1 then.
        num_samples (`int`):
            Number of examples for a calibrated start.
        score_lr (`float`):
            Learning rate that `PruningTrainer` and `create_pruning_optimizer` give the scores by default.
        score_betas (`list[float]`, *optional*):
            Adam's β₁ and β₂ for the scores, such as `[0.9, 0.99]`, which suits trainings of a few hundred steps. By
            default those of the optimizer.
        score_rank (`int`):
            Rank of the scores of methods that offer `score="low_rank"`. The default trains as many numbers as a LoRA of
            rank 8 does.
        mask_interval (`int`):
            Number of optimizer steps after which sparsity and masks are recomputed. Checkpoints hold the current mask,
            so a resumed training continues with exactly that mask.

    Raises:
        ValueError: a field is out of range or contradicts another one; the message names field, value and fix.
    """

    sparsity_pattern: Optional[dict[str, float]] = field(
        default_factory=dict, metadata={"help": "Sparsity of single modules, by name or regular expression."}
    )
    allocation: str = field(default="local", metadata={"help": "'local', 'row', 'score' or 'global'."})
    allocation_temperature: Optional[float] = field(
        default=None, metadata={"help": "Temperature of allocation='score'; 1, or 3 from density 0.5 on."}
    )
    granularity: str = field(
        default="weight", metadata={"help": "'weight', '2:4', '32x32', 'row', 'column' or 'head'."}
    )
    initial_sparsity: float = field(default=0.0, metadata={"help": "Sparsity at the beginning of training."})
    sparsity_schedule: str = field(default="cubic", metadata={"help": "'cubic', 'linear' or 'constant'."})
    schedule_start: float = field(default=0.0, metadata={"help": "Share of training at which sparsity begins to grow."})
    schedule_end: float = field(default=0.6, metadata={"help": "Share of training at which sparsity is final."})
    total_steps: Optional[int] = field(default=None, metadata={"help": "Optimizer steps of the training."})
    penalty: float = field(default=0.0, metadata={"help": "Final weight of the penalty on the scores."})
    penalty_schedule: str = field(default="cubic", metadata={"help": "'cubic', 'linear' or 'constant'."})
    score_init: Union[str, float] = field(
        default="zeros", metadata={"help": "'zeros', 'magnitude', 'random', 'wanda', 'sparsegpt', or a number."}
    )
    num_samples: int = field(default=128, metadata={"help": "Number of examples for a calibrated start."})
    score_lr: float = field(default=2e-2, metadata={"help": "Learning rate of the scores."})
    score_betas: Optional[list[float]] = field(default=None, metadata={"help": "Adam's betas for the scores."})
    score_rank: int = field(default=7, metadata={"help": "Rank of the scores with score='low_rank'."})
    mask_interval: int = field(default=1, metadata={"help": "Optimizer steps after which masks are recomputed."})

    def __post_init__(self, density: Optional[float] = None):
        super().__post_init__(density)
        check_sparsity_pattern(self.sparsity_pattern, "It is the share of weights removed, e.g. sparsity=0.9.")
        check_allocation(self)
        check_schedule(self)
        check_training(self)

    def sparsity_schedule_for(self, target: float) -> Schedule:
        """Schedule of the sparsity of a module whose final sparsity is `target`."""
        initial = min(self.initial_sparsity, target)
        return Schedule(initial, target, self.schedule_start, self.schedule_end, self.sparsity_schedule)

    def final_step(self, total_steps: int) -> int:
        """Optimizer step from which on the sparsity is the final one; masks are renewed at some steps only."""
        end = self.schedule_start if self.sparsity_schedule == "constant" else self.schedule_end
        step = math.ceil(end * total_steps)
        step -= (step - 1) / total_steps >= end  # as the schedule counts, which divides
        return min(total_steps, math.ceil(step / self.mask_interval) * self.mask_interval)

    def renews_at(self, step: int, total_steps: int) -> bool:
        """Whether masks are renewed at an optimizer step."""
        return step % self.mask_interval == 0 or step == total_steps

    def penalty_at(self, step: int, total_steps: int) -> float:
        """Weight λ of the penalty at an optimizer step."""
        return Schedule(0.0, self.penalty, curve=self.penalty_schedule).at(step, total_steps)

    def doubts(self, total_steps: int, learning_rate: Optional[float] = None, decays: bool = True) -> list[str]:
        """Too few steps for the sparsity, or scores that learn too slowly or too fast."""
        found = doubts.of_steps(self.sparsity, total_steps)
        if self.recipe().importance.tensors:
            found += doubts.of_rate("score_lr", self.score_lr, doubts.SCORE_LR, "scores")
        return found

    @property
    def temperature(self) -> float:
        """Temperature of `allocation="score"` (SMP, section 4.1: 1, and 3 or 4 from a density of 0.5 on)."""
        if self.allocation_temperature is not None:
            return self.allocation_temperature
        return 3.0 if self.sparsity is not None and self.sparsity <= 0.5 else 1.0

    def score_start(self) -> Any:
        """Where scores start: `score_init`, or at random for tests."""
        return self.score_init if self.init_weights else "random"

    def learned_scores(self) -> Importance:
        """Scores as the field `score` of a method asks for them."""
        if getattr(self, "score", "movement") == "low_rank":
            # random factors need no calibration
            start = self.score_init if self.init_weights or self.score_init not in CALIBRATED_STARTS else "magnitude"
            return LowRank(start, self.score_rank, random=not self.init_weights)
        return Learned(self.score_start())
