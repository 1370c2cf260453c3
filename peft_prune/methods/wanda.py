"""Wanda (Sun et al., ICLR 2024, arXiv 2306.11695): magnitude times the norm of the input, without training."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Optional

from peft.utils import PeftType

from ..calibrated_config import OneShotConfig
from ..config_checks import check_choice, check_number, check_whole
from ..importance.activation import Activation
from ..importance.hessian import Hessian
from ..layers.linear import LAYER_CLASSES
from ..recipe import Moment, Recipe
from ..rules.solved import Refined
from ..rules.topk import TopKOnce
from ..tuner.model import PruningModel
from ..tuner.registration import register_method
from ..updates.base import Keep, Update
from ..updates.low_rank import LowRank


@dataclass
class WandaConfig(OneShotConfig):
    """
    Configuration of Wanda (Sun et al. 2024): of each row the weights with the largest `|W| · ‖x‖` stay. No weight
    changes. Get the model, then call [`peft_prune.calibrate`] with batches of text.

    Args:
        sparsity (`float`, *optional*): share of the weights of each row that is removed; 0.5 by default.
        refine (`str`, *optional*):
            `"swaps"` improves the mask until no swap of a kept and a removed weight of a row lowers the loss of the
            output (SparseSwaps, arXiv 2512.10922); it needs the Gram matrix of each layer's inputs. `None` is the
            paper's form.
        update (`str`):
            `"none"`: the mask is all that is stored. `"low_rank"`: a LoRA beside the mask, which starts by making up
            for part of the damage in closed form (SLiM, arXiv 2410.09615) and can be trained.
        r (`int`): rank of `update="low_rank"`.
        lora_alpha (`float`): α of `update="low_rank"`, which is scaled by `lora_alpha / r`.
    """

    refine: Optional[str] = field(default=None, metadata={"help": "'swaps', or None (the paper's)."})
    update: str = field(default="none", metadata={"help": "'none' or 'low_rank'."})
    r: int = field(default=8, metadata={"help": "Rank of update='low_rank'."})
    lora_alpha: float = field(default=8.0, metadata={"help": "update='low_rank' is scaled by lora_alpha / r."})

    def __post_init__(self, density=None):
        super().__post_init__(density)
        self.peft_type = PeftType("WANDA")
        check_choice("refine", self.refine, ("swaps", None))  # type: ignore[arg-type]
        check_choice("update", self.update, ("none", "low_rank"))
        check_whole("r", self.r, 1)
        check_number("lora_alpha", self.lora_alpha, 1e-9, 1e9, "LoRA's usual choice is r or 2r.")

    def recipe(self) -> Recipe:
        """`|W|·‖x‖`; top-k in the row or n:m group, perhaps improved; weights stay; at calibration."""
        rule = (Refined if self.refine else TopKOnce)(granularity=self.granularity, group="row")
        importance = Hessian() if self.refine or self.update == "low_rank" else Activation()
        update: Update = LowRank(self.r, self.lora_alpha, seed=self.seed) if self.update == "low_rank" else Keep()
        return Recipe(importance, rule, update, Moment.CALIBRATION)


class WandaModel(PruningModel):
    """Wanda: a mask from weights and inputs. Configure it with [`WandaConfig`]."""

    prefix = "wanda_"
    layer_classes = LAYER_CLASSES  # inputs of a linear layer are the columns of its matrix


register_method(name="wanda", config_cls=WandaConfig, model_cls=WandaModel)
