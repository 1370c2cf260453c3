"""Pruning methods for PEFT. Importing this package makes PEFT know them."""

from .checked_loading import check_when_loaded
from .config import PruningConfig
from .hub import keep_card_on_push
from .inference import use_dense_kernels, use_sparse_kernels
from .masks.codec import MaskFormatError
from .masks.selection import compile_selection
from .structure import architectures as _architectures  # registers the anatomies  # noqa: F401
from .structure.anatomy import Attention, Block, FeedForward, register_anatomy
from .structure.compact import load_compact, save_compact
from .structure.flops import ModelSize, model_size
from .structure.seal import seal_when_saved
from .structure.shrink import shrink
from .training.callback import PruningCallback
from .training.distillation import distillation_loss
from .training.mixin import PruningTrainerMixin
from .training.optimizer import create_pruning_optimizer
from .training.trainer import PruningTrainer
from .tuners.cached_weight import cache_masked_weights
from .tuners.dsee import DSEEConfig, DSEEModel, prune_once
from .tuners.finalize import finalize
from .tuners.keep_zeros import merge_keeping_zeros
from .tuners.movement import MovementPruningConfig, MovementPruningModel
from .tuners.ppruning import PPruningConfig, PPruningModel, calibrate
from .tuners.schedule import penalty, update_schedule
from .tuners.smp import SMPConfig, SMPModel
from .tuners.unloading import merge_masks_below_other_adapters
from .tuners.verbalizer import make_verbalizer


keep_card_on_push()
merge_masks_below_other_adapters()
check_when_loaded()
seal_when_saved()

__version__ = "0.1.0"

__all__ = [
    "Attention",
    "Block",
    "DSEEConfig",
    "DSEEModel",
    "FeedForward",
    "MaskFormatError",
    "ModelSize",
    "MovementPruningConfig",
    "MovementPruningModel",
    "PPruningConfig",
    "PPruningModel",
    "PruningCallback",
    "PruningConfig",
    "PruningTrainer",
    "PruningTrainerMixin",
    "SMPConfig",
    "SMPModel",
    "cache_masked_weights",
    "calibrate",
    "compile_selection",
    "create_pruning_optimizer",
    "distillation_loss",
    "finalize",
    "load_compact",
    "make_verbalizer",
    "merge_keeping_zeros",
    "model_size",
    "penalty",
    "prune_once",
    "register_anatomy",
    "save_compact",
    "shrink",
    "update_schedule",
    "use_dense_kernels",
    "use_sparse_kernels",
]
