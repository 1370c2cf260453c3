"""Each sample of a batch through a mask of its own."""

from __future__ import annotations

from typing import TYPE_CHECKING, Optional

import torch


if TYPE_CHECKING:
    from .stored_form import StoredForm


def mixed_batch_forward(layer: StoredForm, x: torch.Tensor, adapter_names: list[str]) -> torch.Tensor:
    """Apply a layer to a batch whose sample i goes through adapter `adapter_names[i]`.

    Raises:
        ValueError: adapters are merged, or there is not a name for each sample.
    """
    if layer.merged:
        raise ValueError(
            "Cannot pass `adapter_names` when there are merged adapters, please call `unmerge_adapter` first."
        )
    times, rest = divmod(len(x), len(adapter_names))
    if rest:
        raise ValueError(
            "Length of `adapter_names` should be the same as the number of inputs, but got "
            f"{len(adapter_names)} and {len(x)} respectively."
        )
    # beams, and models that flatten batch and tokens, show a layer several rows of each sample side by side
    names = [name for name in adapter_names for _ in range(times)]
    result: Optional[torch.Tensor] = None
    for name in dict.fromkeys(adapter_names):
        weight = layer.weight
        if name in layer.pruning_config and layer.has_mask(name):
            weight = layer._as_matrix(layer.applied(name, layer._as_matrix(weight)))
        rows = torch.tensor([i for i, other in enumerate(names) if other == name], device=x.device)
        part = layer._apply_weight(x[rows], weight)
        if result is None:
            result = part.new_empty((len(x), *part.shape[1:]))
        result[rows] = part
    assert result is not None
    return result
