"""What an adapter makes of a matrix, beside the sparse model that it was made of."""

from __future__ import annotations

import torch

from ..layers.layer import PruningLayer
from .base import matrix_of
from .mask_file import MaskFile
from .matrices import agree
from .names import Names
from .sources import Weights


@torch.no_grad()
def verify(layer: PruningLayer, adapter_name: str, source: Weights | MaskFile, names: Names) -> float:
    """Merge one matrix, and compare it with the sparse model, which is read again.

    Args:
        layer ([`PruningLayer`]): the layer.
        adapter_name (`str`): its adapter.
        source ([`Weights`] or [`MaskFile`]): the sparse model.
        names ([`Names`]): which tensor is which.

    Returns:
        `float`: the largest absolute difference. Zero, unless values or the base's weights are of another dtype.

    Raises:
        RuntimeError: zeros are elsewhere, or a weight differs by more than rounding.
    """
    base, name = layer.matrix.detach(), layer.module_name
    merged = layer.adapted(adapter_name, base).to(base.dtype)
    layer.host[adapter_name].values = None  # in float32 these take more than the model
    if isinstance(source, MaskFile):
        stored = names.find(f"{name}.weight") or names.require(name)
        expected = base * matrix_of(layer, source.get(stored, layer.weight.shape))
    else:
        expected = matrix_of(layer, source.get(names.require(f"{name}.weight")))
    info = layer.record(adapter_name)
    if "values" not in info:
        same = agree(merged, expected)
    elif info["values"]["dtype"] == "int8":
        step = expected.float().abs().amax(1, keepdim=True) / 127
        same = (merged.float() - expected.float()).abs() <= 0.51 * step + torch.finfo(merged.dtype).eps * merged.abs()
    else:
        same = merged == expected.to(getattr(torch, info["values"]["dtype"])).to(merged.dtype)
    if not bool(same.all()):
        raise RuntimeError(
            f"{name!r}: the adapter does not give the weights of {source.label} in {int((~same).sum())} places. Please "
            "report this."
        )
    wide = torch.promote_types(merged.dtype, expected.dtype)
    return float((merged.to(wide) - expected.to(wide)).abs().max())
