"""An update of low rank, perhaps with a few single places beside it (DSEE, Chen et al. 2023, eq. 3)."""

from __future__ import annotations

import zlib
from dataclasses import dataclass
from typing import Any, Optional

import torch
import torch.nn.functional as F
from torch import nn

from ..solvers.low_rank_error import low_rank_error
from ..storage.codec import MaskFormatError
from .base import Update
from .support import choose_support


@dataclass(frozen=True)
class LowRank(Update):
    """`s·(B·A + S2)` with `s = alpha / r`: beside the mask, `W ⊙ M + ΔW`, or under it, `(W + ΔW) ⊙ M`.

    Of an adapter a layer that is updated holds `A` (r, in), `B` (rows, r), `sparse` (num_sparse,) and `support`, the
    flat positions of these (int64). `rows` are all rows of the matrix, or those of its host's `rows`.

    Args:
        r (`int`): rank.
        alpha (`float`): the update is scaled by `alpha / r`.
        dropout (`float`): dropout of the input of an update beside the mask.
        num_sparse (`int`): number of single places.
        support (`str`): where they are, see [`choose_support`].
        seed (`int`): seed of `A` and of the places.
        random (`bool`): start `B` at random instead of at 0, for tests.
        under_mask (`bool`): whether the update is masked too, in training and in the merge.
    """

    r: int = 16
    alpha: float = 16.0
    dropout: float = 0.0
    num_sparse: int = 0
    support: str = "grebsmo"
    seed: int = 0
    random: bool = False
    under_mask: bool = False

    stores = "mask, and the factors of the update"
    tensors = ("A", "B", "sparse")
    stored = ("support",)
    apart = True
    watched = ("B",)  # while it is 0, A does not move

    @property
    def label(self) -> str:  # type: ignore[override]
        """In words."""
        places = " and sparse places" if self.num_sparse else ""
        return f"low rank{places}, {'under' if self.under_mask else 'beside'} the mask"

    @property
    def trains_under_mask(self) -> bool:  # type: ignore[override]
        """Whether the update is masked."""
        return self.under_mask

    @property
    def scaling(self) -> float:
        """s, by which the update is scaled."""
        return self.alpha / self.r

    @torch.inference_mode(False)
    @torch.no_grad()
    def add(self, layer: Any, name: str) -> None:
        """`A` normal with standard deviation 0.02, `B` and `S2` zero; the places, unless they are to be loaded."""
        host, matrix = layer.host[name], layer.matrix.detach()
        if not host.updated:
            return
        part = matrix if host.rows is None else matrix[host.rows.to(matrix.device)]
        seed = zlib.crc32(f"{self.seed}:{layer.module_name}".encode())  # layers of one shape start apart
        spread = 0.02 * torch.randn(self.r, part.shape[1], generator=torch.Generator().manual_seed(seed))
        layer.held("A")[name] = nn.Parameter(spread.to(matrix.device))
        start = torch.zeros(part.shape[0], self.r)
        if self.random:
            start.normal_(0, 0.02)  # not seeded, so that two such adapters differ
        layer.held("B")[name] = nn.Parameter(start.to(matrix.device))
        if self.num_sparse:
            layer.held("sparse")[name] = nn.Parameter(torch.zeros(self.num_sparse, device=matrix.device))
            places = torch.zeros(self.num_sparse, dtype=torch.int64, device=matrix.device)
            if not host.config.finalized:
                places = choose_support(part, self.support, self.r, self.num_sparse, seed)
            layer.held("support")[name] = places

    def changes_weights(self, layer: Any, name: str) -> bool:
        """Whether the layer is updated."""
        return name in layer.held("A")

    def delta(self, layer: Any, name: str) -> torch.Tensor:
        """`s·(B·A + S2)` as a matrix: float32, shape (out, in); 0 without an update."""
        if not self.changes_weights(layer, name):
            return super().delta(layer, name)
        rows = layer.host[name].rows
        with torch.autocast(layer.weight.device.type, enabled=False):
            part = layer.held("B")[name].float() @ layer.held("A")[name].float()
        if name in layer.held("sparse"):
            flat = part.flatten().index_add(0, layer.held("support")[name], layer.held("sparse")[name].float())
            part = flat.view_as(part)
        if rows is None:
            return self.scaling * part
        change = torch.zeros(layer.shape, device=part.device)
        return change.index_copy(0, rows.to(part.device), self.scaling * part)

    def addend(self, layer: Any, name: str) -> Optional[torch.Tensor]:
        """The update, if it is under the mask."""
        return self.delta(layer, name) if self.under_mask and self.changes_weights(layer, name) else None

    def outside(self, layer: Any, name: str, merging: bool = False) -> Optional[torch.Tensor]:
        """The update, if it is beside the mask; merged under it where the config says `keep_sparse`."""
        if self.under_mask or not self.changes_weights(layer, name):
            return None
        change = self.delta(layer, name)
        masked = merging and getattr(layer.config(name), "keep_sparse", False)
        return change * layer.get_mask(name) if masked else change

    def beside(self, layer: Any, name: str, x: torch.Tensor, result: torch.Tensor) -> torch.Tensor:
        """The output with `s·(B·A + S2)·x`: memory grows with r and the number of places."""
        if self.under_mask or not self.changes_weights(layer, name):
            return result
        rows, a, b = layer.host[name].rows, layer.held("A")[name], layer.held("B")[name]
        x = F.dropout(x.to(a.dtype), self.dropout, layer.training)
        out = (x @ a.T) @ b.T
        if name in layer.held("sparse"):
            places = layer.held("support")[name]
            products = x[..., places % a.shape[1]] * layer.held("sparse")[name]
            out = out.index_add(-1, torch.div(places, a.shape[1], rounding_mode="floor"), products.to(out.dtype))
        if rows is not None:
            whole = out.new_zeros(*out.shape[:-1], layer.shape[0])
            out = whole.index_copy(-1, rows.to(out.device), out)
        return result + (self.scaling * out).to(result.dtype)

    def settle(self, layer: Any, name: str, values: Optional[torch.Tensor]) -> None:
        """Start from the closed form: what of rank r makes up for the pruned weights on the inputs seen (SLiM).

        Raises:
            ValueError: the rank is above the smaller side of the matrix.
        """
        if not self.changes_weights(layer, name):
            return
        weight, inputs = layer.matrix.detach().float(), layer.host[name].seen
        if self.r > min(weight.shape):
            raise ValueError(
                f"r={self.r} is more than the smaller side of {layer.module_name!r}, {min(weight.shape)}. Use a "
                "smaller r, or remove the module from target_modules."
            )
        kept = layer.host[name].recipe.update.inside(layer, name, weight).detach()  # rewritten, perhaps
        pruned = kept * layer.get_mask(name)
        a, b = low_rank_error(weight, pruned, inputs.to(weight.device), self.r, damping=0.01)
        with torch.no_grad():
            layer.held("A")[name].copy_(a)
            layer.held("B")[name].copy_(b / self.scaling)
        layer.cached_weight.clear()

    def final(self, layer: Any, name: str, mask: torch.Tensor) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
        """Nothing: the update stays as it is; it has to be finite."""
        for kind in self.tensors:
            if name in layer.held(kind) and not bool(torch.isfinite(layer.held(kind)[name]).all()):
                raise ValueError(
                    f"{layer.module_name!r}: the update's {kind} holds values that are not finite. Training has "
                    "diverged: lower the learning rate, or go back to an earlier checkpoint."
                )
        return {}, {}

    def check_stored(self, layer: Any, name: str, kind: str, found: torch.Tensor) -> None:
        """Places of the sparse part have to lie in the matrix."""
        if kind != "support" or not found.numel():
            return
        places = layer.held("B")[name].shape[0] * layer.held("A")[name].shape[1]
        if not (0 <= int(found.min()) and int(found.max()) < places):
            raise MaskFormatError(
                f"The sparse update of {layer.module_name!r} has positions from {int(found.min())} to "
                f"{int(found.max())}, but the matrix has {places}: the file is damaged. Download or save it again."
            )

    def kept_when_final(self) -> tuple[str, ...]:
        """All of the update."""
        return self.tensors
