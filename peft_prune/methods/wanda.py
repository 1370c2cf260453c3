"""Wanda (Sun et al., ICLR 2024, arXiv 2306.11695): magnitude times the norm of the input, without training."""

from __future__ import annotations

from dataclasses import dataclass, field

from peft.utils import PeftType

from ..calibrated_config import CalibratedConfig
from ..config_checks import check_single_weights
from ..importance.activation import Activation
from ..layers.linear import LAYER_CLASSES
from ..recipe import Moment, Recipe
from ..rules.topk import TopKOnce
from ..tuner.model import PruningModel
from ..tuner.registration import register_method
from ..updates.base import Keep


@dataclass
class WandaConfig(CalibratedConfig):
    """
    Configuration of Wanda (Sun et al. 2024): of each row the weights with the largest `|W| · ‖x‖` stay. No weight
    changes. Get the model, then call [`peft_prune.calibrate`] with batches of text.

    Args:
        sparsity (`float`, *optional*): share of the weights of each row that is removed; 0.5 by default.
        granularity (`str`): `"weight"`, or an n:m pattern such as `"2:4"`, whose groups compete instead of rows.
    """

    granularity: str = field(default="weight", metadata={"help": "'weight', or n:m such as '2:4'."})

    def __post_init__(self, density=None):
        super().__post_init__(density)
        self.peft_type = PeftType("WANDA")
        check_single_weights(self.granularity)

    def recipe(self) -> Recipe:
        """`|W|·‖x‖`; top-k in the row or n:m group; weights are left as they are; at calibration."""
        return Recipe(Activation(), TopKOnce(granularity=self.granularity, group="row"), Keep(), Moment.CALIBRATION)


class WandaModel(PruningModel):
    """Wanda: a mask from weights and inputs. Configure it with [`WandaConfig`]."""

    prefix = "wanda_"
    layer_classes = LAYER_CLASSES  # inputs of a linear layer are the columns of its matrix


register_method(name="wanda", config_cls=WandaConfig, model_cls=WandaModel)
