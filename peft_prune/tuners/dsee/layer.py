"""The layer of DSEE: a masked weight, and beside it an update of low rank and one of a few places."""

from __future__ import annotations

import zlib
from typing import Any, Optional, cast

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from ...masks.codec import MaskFormatError
from ...masks.decomposition import decompose
from ..layer import PruningLayer
from ..linear import PrunedLinear, PrunedLinearConv1D
from ..quantized import PrunedQuantizedLinear
from ..schedule import sparsity
from ..stored_form import FinalForm
from ..watch import warn_once
from .config import DSEEConfig
from .prune import check_units, prune_once


class DSEELayer(PruningLayer):
    """`W ⊙ S1 + s·(B·A + S2)` (Chen et al. 2023, eq. 3).

    Of an adapter a layer that is updated holds `A` (r, in), `B` (rows, r), `sparse` (num_sparse,) and `support`, the
    flat positions of these (int64); `rows` are all rows of the matrix, or of a fused one those of queries and values.
    """

    updates = ("A", "B", "sparse")
    trained_names = (*PruningLayer.trained_names, *updates)
    watched_names = ("B",)  # while it is 0, A does not move
    stored_names = (*PruningLayer.stored_names, "support")
    derived_names = ()

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        # by adapter: rows that are updated, `None` for all
        self.updated_rows: dict[str, Optional[torch.Tensor]] = {}
        self.dropout = nn.ModuleDict()
        self.other_param_names = (*self.other_param_names, "updated_rows", "dropout")

    @torch.inference_mode(False)
    @torch.no_grad()
    def add_update(self, name: str, config: DSEEConfig, rows: Optional[torch.Tensor]) -> None:
        """Give an adapter its update: `A` normal with standard deviation 0.02, `B` and `S2` zero."""
        matrix = self.matrix.detach()
        part = matrix if rows is None else matrix[rows.to(matrix.device)]
        seed = zlib.crc32(f"{config.seed}:{self.module_name}".encode())  # layers of one shape start apart
        generator = torch.Generator().manual_seed(seed)
        spread = 0.02 * torch.randn(config.r, part.shape[1], generator=generator)
        self.updated_rows[name] = rows
        self.held("A")[name] = nn.Parameter(spread.to(matrix.device))
        start = torch.zeros(part.shape[0], config.r)
        if not config.init_weights:
            start.normal_(0, 0.02)  # not seeded, so that two such adapters differ
        self.held("B")[name] = nn.Parameter(start.to(matrix.device))
        if config.num_sparse:
            self.held("sparse")[name] = nn.Parameter(torch.zeros(config.num_sparse, device=matrix.device))
            places = torch.zeros(config.num_sparse, dtype=torch.int64, device=matrix.device)
            self.held("support")[name] = places if config.finalized else choose_support(part, config, seed)
        self.dropout[name] = nn.Dropout(config.lora_dropout).train(self.training)
        self._move_adapter_to_device_of_base_layer(name)  # and to its dtype, as for what the base class adds
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def _add_trained(self, name: str, config: Any) -> None:
        self._add_progress(name, self.matrix.numel())

    def check_stored_tensor(self, name: str, kind: str, found: torch.Tensor) -> None:
        """Places of the sparse part have to lie in the matrix."""
        places = self.held("B")[name].shape[0] * self.held("A")[name].shape[1] if kind == "support" else 0
        if kind == "support" and found.numel() and not (0 <= int(found.min()) and int(found.max()) < places):
            raise MaskFormatError(
                f"The sparse update of {self.module_name!r} has places from {int(found.min())} to {int(found.max())}, "
                f"and the matrix has {places}: the file is damaged. Download or save it again."
            )

    # ------------------------------------------------------------------- masks

    @classmethod
    def advance(
        cls, model: nn.Module, name: str, layers: list[Any], step: int, total_steps: int
    ) -> Optional[dict[str, float]]:
        """Prune when the schedule passes `prune_at`; before and after, only the step is noted."""
        when = layers[0].pruning_config[name].final_step(total_steps)
        if layers[0].steps(name)[0] < 0:
            check_units(model, name, layers)  # now, and not in the middle of training
        if layers[0].steps(name)[0] < when <= step:
            prune_once(model, name)
        for layer in layers:
            layer.set_kept(name, None, step, total_steps)
        return {"sparsity": sparsity(layers, name), "penalty_lambda": 0.0}

    def renew(self, adapter_name: str) -> None:
        """Nothing to do: the mask is found once, by [`prune_once`]."""

    def final_form(self, adapter_name: str) -> FinalForm:
        """The mask in its stored form; the update stays as it is."""
        config = cast(DSEEConfig, self.pruning_config[adapter_name])
        step, total, _ = self.progress[adapter_name].tolist()
        if step < config.prune_at * total or step < 0:
            warn_once(
                "dsee",
                f"The DSEE adapter {adapter_name!r} was never pruned: its schedule stands at step {step} of {total}. "
                "Train on, or call peft_prune.prune_once(model) first.",
            )
        for kind in self.updates:
            if adapter_name in self.held(kind) and not bool(torch.isfinite(self.held(kind)[adapter_name]).all()):
                raise ValueError(
                    f"{self.module_name!r}: the update's {kind} holds values that are not finite. Training has "
                    "diverged: lower the learning rate, or go back to an earlier checkpoint."
                )
        info, stored = self.stored_form(self.get_mask(adapter_name))
        return FinalForm(info, stored)

    def become_final(self, adapter_name: str, form: FinalForm) -> None:
        """Replace the mask of training by the final one."""
        del self.progress[adapter_name]
        self.set_mask(adapter_name, form.mask)

    # ----------------------------------------------------------------- forward

    def changes_weights(self, adapter_name: str) -> bool:
        """Whether an adapter has an update here."""
        return adapter_name in self.held("A")

    def delta(self, name: str) -> torch.Tensor:
        """`s·(B·A + S2)` as a matrix: float32, shape (out, in); 0 without an update."""
        config, rows = cast(DSEEConfig, self.pruning_config[name]), self.updated_rows.get(name)
        change = torch.zeros(self.shape, device=self.weight.device)
        if not self.changes_weights(name):
            return change
        with torch.autocast(change.device.type, enabled=False):
            part = self.held("B")[name].float() @ self.held("A")[name].float()
        if name in self.held("sparse"):
            flat = part.flatten().index_add(0, self.held("support")[name], self.held("sparse")[name].float())
            part = flat.view_as(part)
        if rows is not None:
            return change.index_copy(0, rows.to(change.device), config.scaling * part)
        return config.scaling * part

    def adapted(self, name: str, matrix: torch.Tensor) -> torch.Tensor:
        """What an adapter makes of a matrix (out, in) when it is merged: sparse or not, as the config says."""
        if cast(DSEEConfig, self.pruning_config[name]).keep_sparse:
            return (matrix + self.delta(name).to(matrix.dtype)) * self.get_mask(name)
        return self.applied(name, matrix)

    def applied(self, name: str, matrix: torch.Tensor) -> torch.Tensor:
        """What an adapter makes of a matrix (out, in) until it is merged."""
        return matrix * self.get_mask(name) + self.delta(name).to(matrix.dtype)

    def effective_weight(self, weight: torch.Tensor) -> torch.Tensor:
        """The masked weight alone: the update is added to the output."""
        names = [name for name in self.active_adapters if name in self.pruning_config]
        if len(names) > 1 and any(self.changes_weights(name) for name in names):
            return super().effective_weight(weight)  # raises
        for name in names:
            self._look_at_schedule(name)
            weight = weight * self._as_matrix(self.get_mask(name))
        return weight

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        plain = self.disable_adapters or self.merged or kwargs.get("adapter_names") is not None
        result = super().forward(x, *args, **kwargs)
        if not plain:
            for name in self.active_adapters:
                if self.changes_weights(name):
                    result = result + self._update_of(name, x, result)
        return result

    def _update_of(self, name: str, x: torch.Tensor, result: torch.Tensor) -> torch.Tensor:
        """`s·(B·A + S2)·x` without a matrix of the weight's size: memory grows with r and the number of places."""
        config, rows = cast(DSEEConfig, self.pruning_config[name]), self.updated_rows.get(name)
        a, b = self.held("A")[name], self.held("B")[name]
        x = self.dropout[name](x.to(a.dtype))
        out = (x @ a.T) @ b.T
        if name in self.held("sparse"):
            places = self.held("support")[name]
            columns = places % a.shape[1]
            products = x[..., columns] * self.held("sparse")[name]
            out = out.index_add(-1, torch.div(places, a.shape[1], rounding_mode="floor"), products.to(out.dtype))
        if rows is not None:
            whole = out.new_zeros(*out.shape[:-1], self.shape[0])
            out = whole.index_copy(-1, rows.to(out.device), out)
        return (config.scaling * out).to(result.dtype)


def choose_support(matrix: torch.Tensor, config: DSEEConfig, seed: int) -> torch.Tensor:
    """Flat positions of the trained places of a matrix: int64, ascending, shape (num_sparse,)."""
    if config.num_sparse > matrix.numel():
        raise ValueError(f"num_sparse={config.num_sparse!r} is more than the {matrix.numel()} weights of a matrix.")
    if config.support == "grebsmo":
        rank = min(config.r, *matrix.shape)
        return decompose(matrix[None], rank, config.num_sparse, seed=seed).places[0]
    if config.support == "magnitude":
        return matrix.abs().flatten().topk(config.num_sparse).indices.sort().values
    generator = torch.Generator().manual_seed(seed)
    return torch.randperm(matrix.numel(), generator=generator)[: config.num_sparse].sort().values.to(matrix.device)


class DSEELinear(DSEELayer, PrunedLinear):
    """`nn.Linear` under DSEE."""


# PEFT's "all-linear" knows a linear layer that is adapted already by "Linear" in the name of its class
class DSEELinearConv1D(DSEELayer, PrunedLinearConv1D):
    """Transformers' `Conv1D` under DSEE."""


class DSEEQuantizedLinear(DSEELayer, PrunedQuantizedLinear):
    """A linear layer with a quantised weight under DSEE."""


DSEE_LAYERS: dict[type[nn.Module], type[PruningLayer]] = {nn.Linear: DSEELinear, Conv1D: DSEELinearConv1D}
