"""Movement pruning (Sanh, Wolf and Rush, NeurIPS 2020, arXiv 2005.07683): kept weights are fine-tuned."""

from ...registration import register_method
from .config import MovementPruningConfig
from .model import MovementPruningModel


__all__ = ["MovementPruningConfig", "MovementPruningModel"]

register_method(name="movement", config_cls=MovementPruningConfig, model_cls=MovementPruningModel)
