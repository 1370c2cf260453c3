"""The masked weight, kept between forward passes of inference, so that they cost what those of the base model cost."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Optional

import torch
from torch import nn


# torch before 2.7 cannot tell
_is_exporting = getattr(torch.compiler, "is_exporting", torch.compiler.is_compiling)


def version(tensor: torch.Tensor) -> int:
    """How often a tensor was changed in place; those made in inference mode do not count."""
    return 0 if tensor.is_inference() else tensor._version


class CachedWeight:
    """One tensor, and what it was made from: it is recomputed when one of these is another tensor, or was changed.

    Changes are known by the counters that torch keeps of operations in place. Operations on `weight.data` are not
    counted; `model.train()` drops what is cached.
    """

    def __init__(self) -> None:
        self.enabled = True
        self._made_from: list[Any] = []
        self._weight: Optional[torch.Tensor] = None

    def get(self, key: Any, sources: list[torch.Tensor], make: Callable[[], torch.Tensor]) -> torch.Tensor:
        """The tensor that `make` returns, from an earlier call if there was one with the same key and sources."""
        if self._weight is None and _is_exporting():
            return make()  # of fake tensors, which are nothing to keep
        if self._weight is None or not torch.compiler.is_compiling():
            self._refresh(key, sources, make)
        assert self._weight is not None
        return self._weight

    @torch.compiler.disable
    @torch.inference_mode(False)  # what is kept may be needed outside of it
    @torch.no_grad()
    def _refresh(self, key: Any, sources: list[torch.Tensor], make: Callable[[], torch.Tensor]) -> None:
        # held, so that identities cannot be those of other tensors; the address notices a move to another device
        made_from = [key, *((id(t), version(t), t.data_ptr()) for t in sources), sources]
        if self._weight is None or made_from[:-1] != self._made_from[:-1]:
            self._weight, self._made_from = make(), made_from

    def clear(self) -> None:
        """Let go of the tensor."""
        self._weight, self._made_from = None, []


def cache_masked_weights(model: nn.Module, enabled: bool = True) -> None:
    """Switch the cache of masked weights on or off; it is on by default.

    In eval mode and without gradients, each pruned layer keeps its masked weight, so that the pruned weights are in
    memory twice. `model.merge_adapter()` is as fast and needs no memory; switch the cache off if you can use neither.

    Args:
        model (`nn.Module`): any model that contains pruning layers.
        enabled (`bool`): whether masked weights are kept.
    """
    for module in model.modules():
        cache = getattr(module, "cached_weight", None)
        if isinstance(cache, CachedWeight):
            cache.enabled = enabled
            cache.clear()
