"""SparseGPT (Frantar & Alistarh, ICML 2023, arXiv 2301.00774) and its successors: masks and new values, no training."""

from __future__ import annotations

from dataclasses import dataclass, field

from peft.utils import PeftType

from ..calibrated_config import OneShotConfig
from ..config_checks import check_choice, check_number, check_whole
from ..importance.hessian import Hessian
from ..layers.linear import LAYER_CLASSES
from ..recipe import Moment, Recipe
from ..rules.solved import Solved
from ..storage.values import VALUE_DTYPES
from ..tuner.model import PruningModel
from ..tuner.registration import register_method
from ..updates.rewrite import Rewrite
from ..updates.together import Together


SOLVERS = ("admm", "sparsegpt")


@dataclass
class SparseGPTConfig(OneShotConfig):
    """
    Configuration of one-shot pruning that rewrites the kept weights, so that each layer's output changes least on
    calibration data. Get the model, then call [`peft_prune.calibrate`] with batches of text.

    Args:
        solver (`str`):
            `"admm"` (Boža 2024, with the least squares of ALPS, Meng et al. 2024), or `"sparsegpt"`, the paper's.
        damping (`float`):
            Share of the mean squared input that is added to all, so that the problem is well posed.
        block_size (`int`):
            Columns that share a threshold with `solver="sparsegpt"`.
        value_dtype (`str`):
            How kept values are stored: `"float32"`, `"float16"`, `"bfloat16"`, or `"int8"` with a scale for each row.
        update (`str`):
            `"low_rank"` adds a LoRA beside the mask, initialised in closed form to repair part of what the new values
            cannot; it can be trained. `"none"` adds nothing.
        r (`int`): rank of `update="low_rank"`.
        lora_alpha (`float`): α of `update="low_rank"`, which is scaled by `lora_alpha / r`.
    """

    solver: str = field(default="admm", metadata={"help": "'admm' or 'sparsegpt' (the paper's)."})
    damping: float = field(default=0.01, metadata={"help": "Share of the mean squared input added to all."})
    block_size: int = field(default=128, metadata={"help": "Columns that share a threshold with 'sparsegpt'."})
    value_dtype: str = field(default="float16", metadata={"help": "'float32', 'float16', 'bfloat16' or 'int8'."})

    def __post_init__(self, density=None):
        super().__post_init__(density)
        self.peft_type = PeftType("SPARSEGPT")
        check_choice("solver", self.solver, SOLVERS)
        check_choice("value_dtype", self.value_dtype, tuple(VALUE_DTYPES))
        check_number("damping", self.damping, 1e-9, 1.0, "The papers use 0.01.")
        check_whole("block_size", self.block_size, 1)

    def recipe(self) -> Recipe:
        """The loss of the output; top-k in blocks, rows or groups; kept weights are rewritten; at calibration."""
        rule = Solved(self.granularity, "row", self.allocation, self.solver, self.damping, self.block_size)
        rewritten, beside = Rewrite(self.value_dtype), self.beside_mask()
        return Recipe(Hessian(), rule, Together(rewritten, beside) if beside else rewritten, Moment.CALIBRATION)


class SparseGPTModel(PruningModel):
    """One-shot pruning with new values. Configure it with [`SparseGPTConfig`]."""

    prefix = "sparsegpt_"
    layer_classes = LAYER_CLASSES  # inputs of a linear layer are the columns of its matrix
    quantized_layer_class = None  # values are those of floating-point weights


register_method(name="sparsegpt", config_cls=SparseGPTConfig, model_cls=SparseGPTModel)
