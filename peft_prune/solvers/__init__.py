"""Which weights of one matrix to remove, and what the others become: mathematics on tensors, without models or PEFT.

A matrix `W` is float, shape (out, in); its inputs `X`, shape (tokens, in), enter as the Gram matrix `G = XᵀX`. Every
solver lowers the loss of the output, `‖(Ŵ − W)Xᵀ‖² = tr((Ŵ − W) G (Ŵ − W)ᵀ)`, see [`loss`]. What is removed is a share
of each row, or all but `n` of every `m` weights along a row, see [`Pattern`]. Rows do not depend on each other.
"""

from .admm import admm
from .gram import add_inputs, damped, loss
from .least_squares import refit, refit_exactly
from .low_rank_error import low_rank_error
from .outliers import outlier_ratio, owl_sparsities
from .pattern import Pattern
from .sparsegpt import sparsegpt
from .swaps import improve_mask
from .units import order_without_repair, removal_order, repair, unit_losses


__all__ = [
    "Pattern",
    "add_inputs",
    "admm",
    "damped",
    "improve_mask",
    "loss",
    "low_rank_error",
    "order_without_repair",
    "outlier_ratio",
    "owl_sparsities",
    "refit",
    "refit_exactly",
    "removal_order",
    "repair",
    "sparsegpt",
    "unit_losses",
]
