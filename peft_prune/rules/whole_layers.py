"""How many blocks stay, and what happens to the others: no head and no neuron is left in them."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass
from typing import Any, cast

import torch

from ..calibration.walk import quiet, taken_batches
from ..importance.whole_blocks import BlockImportance
from ..layers.sharding import agreed
from ..structure.depth import Stack, find_stack, output_bias


@dataclass(frozen=True)
class WholeLayers:
    """Blocks go as a whole until so many are left. The first always stays: every model needs it.

    Args:
        keep (`int`): number of blocks that stay.
        importance ([`BlockImportance`]): which ones go.
        samples (`int`): number of examples that this is decided on.
    """

    keep: int
    importance: BlockImportance
    samples: int

    def candidates(self, model: Any, pruned: Collection[str]) -> tuple[Stack, list[int]]:
        """The model's blocks, and the numbers of those that may go: all their heads and neurons can be pruned.

        Args:
            model (`nn.Module`): the model.
            pruned (`Collection[str]`): names of the modules that are pruned.

        Raises:
            ValueError: whole blocks cannot be removed from this model, or not as many.
        """
        stack = find_stack(model)
        total = len(stack.blocks)
        if self.keep > total:
            raise ValueError(
                f"keep_layers={self.keep} is more than the {total} layers of {type(model).__name__}. Leave it out to "
                "keep them all."
            )
        whole = [i for i in range(1, total) if all(site.output in pruned for site in stack.sites[stack.blocks[i]])]
        if total - self.keep > len(whole):
            raise ValueError(
                f"keep_layers={self.keep} removes {total - self.keep} layers, but only {len(whole)} can be removed: "
                "those behind the first in which all heads and neurons are pruned. Use a larger keep_layers, or leave "
                "out target_modules, exclude_modules and layers_to_transform."
            )
        return stack, whole

    def removed(self, model: Any, pruned: Collection[str], batches: Iterable[Any]) -> list[str]:
        """Names of the modules whose heads and neurons go with their blocks.

        Args:
            model (`nn.Module`): the model, dense.
            pruned (`Collection[str]`): names of the modules that are pruned.
            batches (`Iterable`): calibration data.
        """
        stack, candidates = self.candidates(model, pruned)
        count = len(stack.blocks) - self.keep
        if not count:
            return []
        blocks = [model.get_submodule(name) for name in stack.blocks]
        adds = [output_bias(model, stack.sites[name]) for name in stack.blocks]
        with quiet(model), torch.no_grad():
            batches = taken_batches(model, batches, self.samples, torch.device("cpu"))
            taken = [(inputs, cast(torch.Tensor, real)) for inputs, (real, _) in batches]
            found = self.importance.least(model, blocks, adds, taken, candidates, count)
        return [site.output for number in agreed(found) for site in stack.sites[stack.blocks[number]]]
