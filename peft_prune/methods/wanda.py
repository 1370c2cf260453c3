"""Wanda (Sun et al., ICLR 2024, arXiv 2306.11695): magnitude times the norm of the input, without training."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Optional

from peft.utils import PeftType

from ..calibrated_config import OneShotConfig
from ..config_checks import check_choice
from ..importance.activation import Activation
from ..importance.hessian import Hessian
from ..layers.linear import LAYER_CLASSES
from ..recipe import Moment, Recipe
from ..rules.solved import Refined
from ..rules.topk import TopKOnce
from ..tuner.model import PruningModel
from ..tuner.registration import register_method
from ..updates.base import Keep


@dataclass
class WandaConfig(OneShotConfig):
    """
    Configuration of Wanda (Sun et al. 2024): in each row the weights with the largest `|W| · ‖x‖` are kept, and swaps
    improve that choice. No weight changes. Get the model, then call [`peft_prune.calibrate`] with batches of text.

    Args:
        sparsity (`float`, *optional*): share of the weights of each row to remove; 0.5 by default.
        refine (`str`, *optional*):
            `"swaps"` improves the mask until no swap of a kept and a removed weight of a row lowers the loss of the
            output (SparseSwaps, arXiv 2512.10922); it needs the Gram matrix of each layer's inputs. `None` is the
            paper's form: half the time, and less memory.
        update (`str`):
            `"none"`: only the mask is stored. `"low_rank"`: a LoRA beside the mask, initialised in closed form to
            repair part of the damage (SLiM, arXiv 2410.09615); it can be trained.
        r (`int`): rank of `update="low_rank"`.
        lora_alpha (`float`): α of `update="low_rank"`, which is scaled by `lora_alpha / r`.
    """

    refine: Optional[str] = field(default="swaps", metadata={"help": "'swaps', or None (the paper's)."})

    def __post_init__(self, density=None):
        super().__post_init__(density)
        self.peft_type = PeftType("WANDA")
        check_choice("refine", self.refine, ("swaps", None))  # type: ignore[arg-type]

    def recipe(self) -> Recipe:
        """`|W|·‖x‖`; top-k in the row or n:m group, perhaps improved; weights stay; at calibration."""
        rule = (Refined if self.refine else TopKOnce)(self.granularity, "row", self.allocation)
        beside = self.beside_mask()
        importance = Hessian() if self.refine or beside else Activation()
        return Recipe(importance, rule, beside or Keep(), Moment.CALIBRATION)


class WandaModel(PruningModel):
    """Wanda: a mask from weights and inputs. Configure it with [`WandaConfig`]."""

    prefix = "wanda_"
    layer_classes = LAYER_CLASSES  # inputs of a linear layer are the columns of its matrix


register_method(name="wanda", config_cls=WandaConfig, model_cls=WandaModel)
