"""SMP: Static Model Pruning (Jiang et al., Findings of ACL 2023, arXiv 2210.06210)."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Union

from peft.utils import PeftType

from ..config_checks import check_choice
from ..recipe import Moment, Recipe
from ..rules.topk import TopK
from ..trained_config import TrainedConfig
from ..tuner.model import PruningModel
from ..tuner.registration import register_method
from ..updates.base import Keep


@dataclass
class SMPConfig(TrainedConfig):
    """
    Configuration of Static Model Pruning (Jiang et al. 2023), which learns which weights of a frozen model to keep.

    The fields are those of [`TrainedConfig`]. `allocation="score"` is the paper's SMP-S, `"local"` its SMP-L. The
    defaults are the paper's: sparsity grows on a cubic over the first 60 % of training, the penalty on a cubic over all
    of it to 400, scores learn at 2e-2. One is not: scores start at `|W| / std(W)`, since from 0 (`score_init="zeros"`,
    the paper's) a short training does not get away from the noise of its first steps.

    Args:
        score (`str`):
            `"movement"`: each weight has a score of its own, as in the paper. `"low_rank"`: the scores of a matrix are
            where they start, plus a product of rank `score_rank`, plus a number for each row and each column (PST, Li
            et al. 2022), so that as few numbers are trained as by a LoRA.

    Example:

        ```py
        >>> from peft_prune import SMPConfig

        >>> config = SMPConfig(task_type="SEQ_CLS", sparsity=0.9, allocation="score")
        ```
    """

    score: str = field(default="movement", metadata={"help": "'movement' or 'low_rank'."})
    penalty: float = field(default=400.0, metadata={"help": "Final weight of the penalty on the scores."})
    score_init: Union[str, float] = field(
        default="magnitude", metadata={"help": "'magnitude', 'zeros' (the paper's), 'wanda', 'sparsegpt' or 'random'."}
    )

    def __post_init__(self, density=None):
        check_choice("score", self.score, ("movement", "low_rank"))
        super().__post_init__(density)
        self.peft_type = PeftType("SMP")

    def recipe(self) -> Recipe:
        """Learned scores; the largest stay; weights are left as they are; at every step."""
        return Recipe(self.learned_scores(), TopK(self.allocation, self.granularity), Keep(), Moment.EVERY_STEP)


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
