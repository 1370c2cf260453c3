"""Pruning methods for PEFT. Importing this package makes PEFT know them."""

from .config import PruningConfig
from .hub import keep_card_on_push
from .masks.codec import MaskFormatError
from .training.callback import PruningCallback
from .training.distillation import distillation_loss
from .training.optimizer import create_pruning_optimizer
from .training.trainer import PruningTrainer
from .tuners.finalize import finalize
from .tuners.schedule import penalty, update_schedule
from .tuners.smp import SMPConfig, SMPModel
from .tuners.verbalizer import make_verbalizer


keep_card_on_push()

__version__ = "0.1.0"

__all__ = [
    "MaskFormatError",
    "PruningCallback",
    "PruningConfig",
    "PruningTrainer",
    "SMPConfig",
    "SMPModel",
    "create_pruning_optimizer",
    "distillation_loss",
    "finalize",
    "make_verbalizer",
    "penalty",
    "update_schedule",
]
