"""The kinds of modules that can be pruned."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Optional, cast

import torch
import torch.nn.functional as F
from torch import nn
from transformers.pytorch_utils import Conv1D

from ..quantization import SUPPORTED, quantization_of
from .layer import PruningLayer
from .masked_linear import MaskedLinear
from .quantized import PrunedQuantizedLinear
from .watch import look_at_schedule


class MatrixLayer(PruningLayer):
    """A layer that multiplies its input by its matrix and does nothing else with it."""

    columns_are_inputs = True

    def _apply_masked(self, x: torch.Tensor) -> torch.Tensor:
        names = self.active_names()
        # several at once, gates, and masks over frozen weights have no use for the lean function
        if len(names) != 1 or not torch.is_grad_enabled() or not self._is_selected_in_training(names[0]):
            return super()._apply_masked(x)
        name = names[0]
        look_at_schedule(self, name)
        recipe = self.host[name].recipe
        scores, penalty = recipe.importance.scores(self, name)
        update, bits = recipe.update.addend(self, name), self.mask_bits(name)
        bias = cast(Optional[torch.Tensor], self.bias)
        # of more than two dimensions the output would be a view made in the function, and such may not be changed in
        # place, as DeBERTa does with its queries
        flat = x.reshape(-1, x.shape[-1])
        block, apart = self.block(name), recipe.update.apart
        result = MaskedLinear.apply(flat, scores, update, self.matrix, bias, bits, penalty, block, apart)
        return result.view(*x.shape[:-1], result.shape[-1])

    def _is_selected_in_training(self, name: str) -> bool:
        recipe = self.host[name].recipe
        under_mask = self.has_scores(name) or recipe.update.trains_under_mask
        return name in self.progress and under_mask and not recipe.importance.gates and not self.weight.requires_grad


class PrunedLinear(MatrixLayer):
    """`nn.Linear` seen through a mask."""

    def _apply_weight(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return F.linear(x, weight, self.bias)


class PrunedLinearConv1D(MatrixLayer):
    """Transformers' `Conv1D` (GPT-2), whose weight is (in, out), seen through a mask."""

    def _as_matrix(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor.T

    def _apply_weight(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        flat = torch.addmm(self.bias, x.reshape(-1, x.shape[-1]), weight)
        return flat.view(*x.shape[:-1], weight.shape[1])


# Looked up by exact type: a subclass may compute something else from its weight.
LAYER_CLASSES: dict[type[nn.Module], type[PruningLayer]] = {nn.Linear: PrunedLinear, Conv1D: PrunedLinearConv1D}


def layer_class_for(
    module: nn.Module,
    classes: Mapping[type[nn.Module], type[PruningLayer]] = LAYER_CLASSES,
    quantized: Optional[type[PruningLayer]] = PrunedQuantizedLinear,
) -> Optional[type[PruningLayer]]:
    """Layer class that can prune a module, or `None`. Subclasses count if they do not override `forward`.

    Args:
        module (`nn.Module`): the module.
        classes (`Mapping`): layer class of each type of module.
        quantized (`type`, *optional*): layer class of linear layers with a quantised weight.
    """
    quantization = quantization_of(module)
    if quantization is not None:
        return quantized if quantization in SUPPORTED and isinstance(module, nn.Linear) else None
    if "weight" not in module._parameters or getattr(module, "max_norm", None) is not None:
        return None  # a weight that is computed, or changes by itself
    for base, layer_class in classes.items():
        if isinstance(module, base) and type(module).forward is base.forward:
            return layer_class
    return None
