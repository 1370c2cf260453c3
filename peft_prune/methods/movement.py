"""Movement pruning (Sanh, Wolf and Rush, NeurIPS 2020, arXiv 2005.07683): kept weights are fine-tuned."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Optional, Union

from peft.utils import PeftType

from .. import doubts
from ..config import reads_old_files
from ..config_checks import check_choice, check_flag, check_number, check_whole
from ..importance.base import Importance
from ..importance.hard_concrete import OPEN_ABOVE, HardConcrete
from ..importance.hessian import Hessian
from ..importance.magnitude import Magnitude
from ..presets import by_preset, check_preset, fill_in
from ..recipe import Moment, Recipe
from ..rules.base import Rule
from ..rules.existing_zeros import ExistingZeros
from ..rules.solved import Solved
from ..rules.threshold import Threshold
from ..rules.topk import TopK
from ..selection.curve import Schedule
from ..storage.values import VALUE_DTYPES
from ..trained_config import TrainedConfig
from ..tuner.model import PruningModel
from ..tuner.registration import register_method
from ..updates.base import Keep, Update
from ..updates.dense import Dense
from ..updates.low_rank import LowRank
from .movement_checks import check_combination, check_in_stages, check_start
from .movement_variants import COMMON, FEW_STEPS, MASKS, PAPERS_THRESHOLD, SCORES, STAGES, VARIANTS


UPDATES = ("full", "low_rank", "none")


@reads_old_files(preset="paper")
@dataclass
class MovementPruningConfig(TrainedConfig):
    """
    Configuration of movement pruning (Sanh et al. 2020), which fine-tunes weights while it learns which ones to keep.

    The base model is not touched: the adapter holds the change of its weights, and in the end the mask and the kept
    values. `variant` and `preset` set the fields that are not given; those of [`TrainedConfig`] apply too.

    Args:
        variant (`str`):
            `"hard"`: the weights of each matrix with the largest learned scores stay, as many as `sparsity` says.
            `"soft"`: those of all matrices whose score is above one threshold. `"l0"`: gates with noise, whose
            probability is penalised. `"magnitude"`: the weights with the largest magnitude stay, recomputed as they
            are trained. `"sparsegpt"`: in three stages of training, removes the weights that change the layers' outputs
            least on `num_samples` examples of the training data, and gives the kept weights new values that make up
            for them; no scores are learned. Of `"soft"` and `"l0"` `penalty` decides how many stay, as in the paper;
            `"soft"` can be given `sparsity` instead, and has its threshold moved to where it is reached.
        preset (`str`):
            `"paper"`: fields that are left out are the paper's, and `"soft"` accepts no `sparsity`. `"auto"`: where
            `sparsity` decides, scores start at `|W| / std(W)` and not at 0, and the sparsity is final after 70 % of
            training and not 80 %, so that a few hundred steps learn something.
        score (`str`, *optional*):
            `"movement"`, learned; `"low_rank"`, learned as factors (see [`SMPConfig`]), `"magnitude"` or `"sparsegpt"`.
        mask (`str`, *optional*):
            `"topk"`, `"threshold"` or `"l0"`: how scores become a mask.
        threshold (`float`):
            τ for `mask="threshold"` without a `sparsity`: weights with `sigmoid(S) > τ` stay. It rises from 0 on the
            sparsity's schedule.
        min_density (`float`):
            Share of each matrix that stays in any case with `mask="threshold"`.
        update (`str`):
            `"full"`: kept weights are trained. `"low_rank"`: they are trained as a LoRA whose update is masked, in
            training and in the merge, so that zeros stay. `"none"`: they stay as they are, which is SMP.
        r (`int`):
            Rank of `update="low_rank"`.
        lora_alpha (`float`):
            α of `update="low_rank"`, which is scaled by `lora_alpha / r`.
        from_existing_zeros (`bool`):
            Take the mask from the zeros of the base weights instead, and fine-tune what is not zero.
        value_dtype (`str`):
            How kept values are stored with `update="full"`: `"float32"`, `"float16"`, `"bfloat16"`, or `"int8"` with a
            scale for each row.
        seed (`int`):
            Seed of the noise of the gates, and of the update of low rank.

    Example:

        ```py
        >>> from peft_prune import MovementPruningConfig

        >>> config = MovementPruningConfig(variant="hard", task_type="SEQ_CLS", sparsity=0.9)
        ```
    """

    variant: str = field(default="hard", metadata={"help": "'hard', 'soft', 'l0', 'magnitude' or 'sparsegpt'."})
    preset: str = field(default="auto", metadata={"help": "'auto' or 'paper'."})
    score: Optional[str] = field(default=None, metadata={"help": "'movement', 'low_rank', 'magnitude' or 'sparsegpt'."})
    mask: Optional[str] = field(default=None, metadata={"help": "'topk', 'threshold' or 'l0'."})
    threshold: float = field(
        default=PAPERS_THRESHOLD, metadata={"help": "Threshold of sigmoid(S) for mask='threshold'."}
    )
    min_density: float = field(default=0.005, metadata={"help": "Least share kept of a matrix by a threshold."})
    update: str = field(default="full", metadata={"help": "'full', 'low_rank' or 'none'."})
    r: int = field(default=8, metadata={"help": "Rank of update='low_rank'."})
    lora_alpha: float = field(default=16.0, metadata={"help": "update='low_rank' is scaled by lora_alpha / r."})
    from_existing_zeros: bool = field(default=False, metadata={"help": "Take the mask from the base's zeros."})
    value_dtype: str = field(default="float32", metadata={"help": "'float32', 'float16', 'bfloat16' or 'int8'."})
    seed: int = field(default=0, metadata={"help": "Seed of the noise of the gates, and of a low-rank update."})
    penalty: Optional[float] = by_preset("Final weight of the penalty on the scores.")  # type: ignore[assignment]
    score_init: Optional[Union[str, float]] = by_preset("Where scores start.")  # type: ignore[assignment]
    score_lr: Optional[float] = by_preset("Learning rate of the scores.")  # type: ignore[assignment]
    sparsity_schedule: Optional[str] = by_preset("'cubic', 'linear' or 'constant'.")  # type: ignore[assignment]
    schedule_start: Optional[float] = by_preset(  # type: ignore[assignment]
        "Share of training at which sparsity begins to grow."
    )
    schedule_end: Optional[float] = by_preset("Share of training at which sparsity is final.")  # type: ignore[assignment]
    num_samples: Optional[int] = by_preset("Number of examples of the training data that are looked at.")  # type: ignore[assignment]

    def __post_init__(self, density=None):
        check_choice("variant", self.variant, tuple(VARIANTS))
        check_flag("from_existing_zeros", self.from_existing_zeros)
        check_whole("seed", self.seed, 0)
        check_whole("r", self.r, 1)
        check_number("lora_alpha", self.lora_alpha, 0.0, 1e9, "LoRA's usual choice is r or 2r.")
        check_preset(self, {"paper": None})
        asked = self.penalty
        paper = COMMON | VARIANTS[self.variant]
        fill_in(self, {name: paper[name] for name in ("score", "mask")})
        check_choice("score", self.score, SCORES)
        check_choice("mask", self.mask, MASKS)
        told = self.moves_threshold(density) or (
            self.preset == "auto" and self.mask == "topk" and self.score != "sparsegpt"
        )
        fill_in(self, paper | (FEW_STEPS[str(self.mask)] if told else {}))
        check_choice("update", self.update, UPDATES)
        check_choice("value_dtype", self.value_dtype, tuple(VALUE_DTYPES))
        check_start(self)
        check_combination(self, density)
        if not self.learns_scores():
            self._without_penalty(asked)
        if self.score == "sparsegpt":
            check_in_stages(self)
        super().__post_init__(density)
        self.peft_type = PeftType("MOVEMENT")
        check_number("threshold", self.threshold, 0.0, 1.0, "The paper uses 0.1.", open_high=True)
        check_number("min_density", self.min_density, 0.0, 1.0, "The paper uses 0.005.")
        self._check_reachable()

    def _check_reachable(self) -> None:
        most = 1.0 - self.min_density
        if self.sparsity and not self.finalized and self.moves_threshold(None) and self.sparsity > most:
            raise ValueError(
                f"sparsity={self.sparsity!r} cannot be reached with min_density={self.min_density!r}, which keeps that "
                f"share of each matrix. Use a sparsity of {most:g} or less, or a smaller min_density."
            )

    def moves_threshold(self, density: Optional[float]) -> bool:
        """Whether the threshold is moved to reach a sparsity; where the penalty decides, files have that as 0."""
        asked = self.sparsity if self.sparsity is not None else density
        return self.preset == "auto" and self.mask == "threshold" and bool(asked)

    def learns_scores(self) -> bool:
        """Whether scores are trained."""
        return self.score in ("movement", "low_rank") and not self.from_existing_zeros

    def _without_penalty(self, asked: Optional[float]) -> None:
        if asked and not self.finalized:
            why = "from_existing_zeros=True" if self.from_existing_zeros else f"score={self.score!r}"
            raise ValueError(f"penalty={asked!r} has no effect with {why}, which learns no scores. Leave it out.")
        self.penalty = 0.0  # the variant may have set another one

    def doubts(self, total_steps: int, learning_rate: Optional[float] = None, decays: bool = True) -> list[str]:
        """Also a learning rate that does not suit the update, and a penalty that removes nothing or everything."""
        in_few_steps = self.score == "sparsegpt"
        found = [] if in_few_steps else super().doubts(total_steps, learning_rate, decays)
        if self.update == "full":
            found += doubts.of_rate("learning_rate", learning_rate, doubts.WEIGHT_LR, "weights that are fine-tuned")
        if self.update == "low_rank":
            found += doubts.of_rate("learning_rate", learning_rate, doubts.FACTOR_LR, "factors of low rank")
        if self.mask != "topk" and not self.from_existing_zeros and not self.sparsity:
            found += doubts.of_penalty(self, total_steps, decays)
        return found

    # ------------------------------------------------------------- the recipe

    def recipe(self) -> Recipe:
        """Learned scores or magnitudes; top-k or a threshold; kept weights are trained; at every step."""
        return Recipe(self._importance(), self._rule(), self._update(), self._moment())

    def _moment(self) -> Moment:
        if self.from_existing_zeros:
            return Moment.START
        return Moment.ONCE if self.score == "sparsegpt" else Moment.EVERY_STEP

    def stages(self, total_steps: int) -> dict[int, float]:
        """Of `score="sparsegpt"`: steps at which weights are removed, and the share of the sparsity reached at each."""
        number = 1 if ":" in self.granularity else STAGES
        filled: Any = self  # by now no field is None
        grows = Schedule(0.0, 1.0, filled.schedule_start, filled.schedule_end, filled.sparsity_schedule)
        return grows.stages(total_steps, number)

    def _importance(self) -> Importance:
        if self.score == "sparsegpt":
            return Hessian()
        if not self.learns_scores():
            return Magnitude()
        if self.mask == "l0":
            return HardConcrete(self.score_start(), self.seed)
        return self.learned_scores()

    def _rule(self) -> Rule:
        if self.from_existing_zeros:
            return ExistingZeros()
        if self.mask == "l0":
            return Threshold(score=OPEN_ABOVE, min_density=self.min_density)
        if self.mask == "threshold":
            filled: Any = self  # by now no field is None
            curve = Schedule(0.0, self.threshold, filled.schedule_start, filled.schedule_end, filled.sparsity_schedule)
            return Threshold(curve, min_density=self.min_density, moves=bool(self.sparsity))
        if self.score == "sparsegpt":
            return Solved(self.granularity)
        return TopK(self.allocation, self.granularity)

    def _update(self) -> Update:
        at_random = not self.init_weights
        if self.update == "low_rank":
            return LowRank(self.r, self.lora_alpha, seed=self.seed, random=at_random, under_mask=True)
        if self.update == "full":
            # where scores start at random, the update need not; and existing zeros are found before it
            return Dense(self.value_dtype, at_random and not self.learns_scores() and not self.from_existing_zeros)
        return Keep()


class MovementPruningModel(PruningModel):
    """
    Movement pruning: learns which weights to keep while it fine-tunes them.

    Args:
        model ([`~transformers.PreTrainedModel`]): the model to prune.
        config ([`MovementPruningConfig`]): the configuration.
        adapter_name (`str`): name of the adapter, `"default"` by default.

    Example:

        ```py
        >>> from transformers import AutoModelForSequenceClassification
        >>> from peft import get_peft_model
        >>> from peft_prune import MovementPruningConfig

        >>> base_model = AutoModelForSequenceClassification.from_pretrained("bert-base-uncased")
        >>> model = get_peft_model(base_model, MovementPruningConfig(variant="hard", sparsity=0.9))
        ```
    """

    prefix = "movement_"


register_method(name="movement", config_cls=MovementPruningConfig, model_cls=MovementPruningModel)
