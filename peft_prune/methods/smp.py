"""SMP: Static Model Pruning (Jiang et al., Findings of ACL 2023, arXiv 2210.06210)."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Optional, Union

from peft.utils import PeftType

from ..config_checks import check_choice
from ..presets import by_preset, check_preset, fill_in
from ..recipe import Moment, Recipe
from ..rules.topk import TopK
from ..trained_config import TrainedConfig
from ..tuner.model import PruningModel
from ..tuner.registration import register_method
from ..updates.base import Keep


# what fields hold that were left out
_BASED_ON_PAPER = {
    "allocation": "local", "sparsity_schedule": "cubic", "penalty": 400.0, "score_init": "magnitude",
    "score_betas": None,
}  # fmt: skip
PRESETS: dict[str, dict[str, Any]] = {
    "encoder": _BASED_ON_PAPER,
    "causal_lm": {
        "allocation": "row", "sparsity_schedule": "constant", "penalty": 0.0, "score_init": "wanda",
        "score_betas": [0.9, 0.99],
    },
    "paper": _BASED_ON_PAPER | {"score_init": "zeros"},
}  # fmt: skip


@dataclass
class SMPConfig(TrainedConfig):
    """
    Configuration of Static Model Pruning (Jiang et al. 2023), which learns which weights of a frozen model to keep.

    The fields are those of [`TrainedConfig`]. `allocation="score"` is the paper's SMP-S, `"local"` its SMP-L. Fields
    that are left out (`None`) are filled in by `preset`.

    Args:
        preset (`str`):
            `"paper"`: sparsity grows on a cubic over the first 60 % of training, the penalty on a cubic over all of it
            to 400, scores start at 0. `"encoder"`: the same, but scores start at `|W| / std(W)`, since from 0 a short
            training does not recover from the noise of its first steps. `"causal_lm"`: scores start at Wanda's ranking
            on calibration data, weights compete within a row, the sparsity is final from the first step on, there is no
            penalty, and the scores' betas are 0.9 and 0.99. `"auto"`: `"causal_lm"` with `task_type="CAUSAL_LM"`,
            otherwise `"encoder"`.
        score (`str`):
            `"movement"`: each weight has its own score, as in the paper. `"low_rank"`: the scores of a matrix are their
            initial values, plus a product of rank `score_rank`, plus one number per row and per column (PST, Li et al.
            2022). That trains as few numbers as a LoRA.

    Example:

        ```py
        >>> from peft_prune import SMPConfig

        >>> config = SMPConfig(task_type="SEQ_CLS", sparsity=0.9, allocation="score")
        ```
    """

    score: str = field(default="movement", metadata={"help": "'movement' or 'low_rank'."})
    preset: str = field(default="auto", metadata={"help": "'auto', 'encoder', 'causal_lm' or 'paper'."})
    allocation: Optional[str] = by_preset("'local', 'row', 'score' or 'global'.")  # type: ignore[assignment]
    sparsity_schedule: Optional[str] = by_preset("'cubic', 'linear' or 'constant'.")  # type: ignore[assignment]
    penalty: Optional[float] = by_preset("Final weight of the penalty on the scores.")  # type: ignore[assignment]
    score_init: Optional[Union[str, float]] = by_preset(  # type: ignore[assignment]
        "'magnitude', 'zeros' (the paper's), 'wanda', 'sparsegpt' or 'random'."
    )
    score_betas: Optional[list[float]] = by_preset("Adam's betas for the scores.")

    def __post_init__(self, density=None):
        check_choice("score", self.score, ("movement", "low_rank"))
        check_preset(self, PRESETS)
        self._fill_in()
        super().__post_init__(density)
        self.peft_type = PeftType("SMP")

    def _fill_in(self) -> None:
        preset = self.preset
        if preset == "auto":
            preset = "causal_lm" if self.task_type == "CAUSAL_LM" else "encoder"
        values = PRESETS[preset]
        if self.granularity != "weight":  # blocks, heads and n:m groups compete in the matrix, or in their group
            values = values | {"allocation": "local"}
        fill_in(self, values)

    def recipe(self) -> Recipe:
        """Learned scores; the largest stay; weights are left as they are; at every step."""
        return Recipe(self.learned_scores(), TopK(str(self.allocation), self.granularity), Keep(), Moment.EVERY_STEP)


class SMPModel(PruningModel):
    """
    Static Model Pruning: adapts a frozen model by choosing which weights to keep.

    Args:
        model ([`~transformers.PreTrainedModel`]): the model to prune.
        config ([`SMPConfig`]): the configuration.
        adapter_name (`str`): name of the adapter, `"default"` by default.

    Example:

        ```py
        >>> from transformers import AutoModelForSequenceClassification
        >>> from peft import get_peft_model
        >>> from peft_prune import SMPConfig

        >>> base_model = AutoModelForSequenceClassification.from_pretrained("bert-base-uncased")
        >>> model = get_peft_model(base_model, SMPConfig(task_type="SEQ_CLS", sparsity=0.9))
        ```
    """

    prefix = "smp_"


register_method(name="smp", config_cls=SMPConfig, model_cls=SMPModel)
