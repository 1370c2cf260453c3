"""The methods: of each a config with its recipe, and a tuner with its name. Importing them registers them with PEFT."""

from .dsee import DSEEConfig, DSEEModel
from .movement import MovementPruningConfig, MovementPruningModel
from .ppruning import PPruningConfig, PPruningModel
from .smp import SMPConfig, SMPModel
from .sparsegpt import SparseGPTConfig, SparseGPTModel
from .structured import StructuredPruningConfig, StructuredPruningModel
from .wanda import WandaConfig, WandaModel


__all__ = [
    "DSEEConfig",
    "DSEEModel",
    "MovementPruningConfig",
    "MovementPruningModel",
    "PPruningConfig",
    "PPruningModel",
    "SMPConfig",
    "SMPModel",
    "SparseGPTConfig",
    "SparseGPTModel",
    "StructuredPruningConfig",
    "StructuredPruningModel",
    "WandaConfig",
    "WandaModel",
]
