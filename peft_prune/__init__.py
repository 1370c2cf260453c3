"""Pruning methods for PEFT. Importing this package registers them with PEFT."""

from .config import PruningConfig
from .importing import mask_from_zeros
from .inference import use_dense_kernels, use_sparse_kernels
from .layers.cached_weight import cache_masked_weights
from .methods import (
    DSEEConfig,
    DSEEModel,
    MovementPruningConfig,
    MovementPruningModel,
    PPruningConfig,
    PPruningModel,
    SMPConfig,
    SMPModel,
    SparseGPTConfig,
    SparseGPTModel,
    StructuredPruningConfig,
    StructuredPruningModel,
    WandaConfig,
    WandaModel,
)
from .recipe import Recipe
from .selection.topk import compile_selection
from .stages.calibrate import calibrate
from .stages.finalize import finalize
from .stages.keep_zeros import merge_keeping_zeros
from .stages.once import prune_once
from .stages.schedule import penalty, update_schedule
from .storage.codec import MaskFormatError
from .structure import architectures as _architectures  # registers the anatomies  # noqa: F401
from .structure.anatomy import Attention, Block, FeedForward, register_anatomy
from .structure.compact import load_compact, save_compact
from .structure.flops import ModelSize, model_size
from .structure.seal import seal_when_saved
from .structure.shrink import shrink
from .structure.sparse_checkpoint import load_sparse, save_sparse
from .structure.standard import save_standard
from .trained_config import TrainedConfig
from .training.callback import PruningCallback
from .training.distillation import distillation_loss
from .training.distilling_trainer import DistillationTrainer
from .training.mixin import PruningTrainerMixin
from .training.optimizer import create_pruning_optimizer
from .training.trainer import PruningTrainer
from .tuner.checked_loading import check_when_loaded
from .tuner.hub import keep_card_on_push
from .tuner.unloading import merge_masks_below_other_adapters
from .tuner.verbalizer import make_verbalizer


keep_card_on_push()
merge_masks_below_other_adapters()
check_when_loaded()
seal_when_saved()

__version__ = "0.2.0"

__all__ = [
    "Attention",
    "Block",
    "DSEEConfig",
    "DSEEModel",
    "DistillationTrainer",
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
    "Recipe",
    "SMPConfig",
    "SMPModel",
    "SparseGPTConfig",
    "SparseGPTModel",
    "StructuredPruningConfig",
    "StructuredPruningModel",
    "TrainedConfig",
    "WandaConfig",
    "WandaModel",
    "cache_masked_weights",
    "calibrate",
    "compile_selection",
    "create_pruning_optimizer",
    "distillation_loss",
    "finalize",
    "load_compact",
    "load_sparse",
    "make_verbalizer",
    "mask_from_zeros",
    "merge_keeping_zeros",
    "model_size",
    "penalty",
    "prune_once",
    "register_anatomy",
    "save_compact",
    "save_sparse",
    "save_standard",
    "shrink",
    "update_schedule",
    "use_dense_kernels",
    "use_sparse_kernels",
]
