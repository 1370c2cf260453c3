"""DSEE (Chen et al., ACL 2023, arXiv 2111.00160): a sparse update on a sparse model, pruned once in training."""

from __future__ import annotations

import copy
import logging
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Optional, Union, cast

import torch
from peft.utils import PeftType
from torch import nn

from ..config import FIELDS_OF_ALL, PruningConfig, reads_old_files
from ..config_checks import check_choice, check_number, check_whole
from ..importance.of_update import OfUpdate
from ..layers.layer import pruning_layers
from ..layers.linear import LAYER_CLASSES
from ..matching import is_target
from ..peft_api import LORA_TARGETS, include_all_linear
from ..recipe import Moment, Recipe
from ..rules.smallest import Smallest
from ..structure.sites import HEADS, find_sites
from ..tuner.model import PruningModel
from ..tuner.registration import register_method
from ..tuner.targets import default_target_modules
from ..tuner.unloading import active_for_merge
from ..updates.low_rank import LowRank
from ..updates.support import SUPPORTS


IMPORTANCES = ("update", "effective", "weight")
_logger = logging.getLogger(__name__)


@reads_old_files(*(name for name in FIELDS_OF_ALL if name != "total_steps"))
@dataclass
class DSEEConfig(PruningConfig):
    """
    Configuration of DSEE (Chen et al. 2023): `W ⊙ S1 + s·(B·A + S2)`, a low-rank and a sparse update of a model that is
    pruned once while they are trained.

    Args:
        r (`int`): rank of the low-rank update `BA`.
        lora_alpha (`float`): α; the update is scaled by `s = α / r`.
        lora_dropout (`float`): dropout before the update.
        num_sparse (`int`): number of trained places of each matrix, `S2`; 0 for none.
        support (`str`):
            Where they are: `"grebsmo"` (what no low-rank matrix explains of the weight), `"random"` or `"magnitude"`.
        target_modules (`Union[list[str], str]`, *optional*):
            Modules that are updated. By default the projections of queries and values.
        prune_target_modules (`Union[list[str], str]`, *optional*):
            Modules that are pruned. By default the linear layers inside the numbered blocks.
        sparsity (`float`, *optional*):
            Share of the weights of pruned modules without update that goes, the smallest of all; by default 0.
        update_sparsity (`float`, *optional*):
            The same for pruned modules with update, ranked by `importance`. By default `sparsity`.
        importance (`str`):
            `"update"` (`|s·(BA + S2)|`), `"effective"` (`|W + s·(BA + S2)|`) or `"weight"` (`|W|`).
        heads_to_prune (`int`):
            Heads that go in each layer: those whose queries and values are updated least.
        neuron_sparsity (`float`):
            Share of the neurons of each feed-forward network that goes, the ones with the smallest weights.
        prune_at (`float`):
            Share of training, in (0, 1], at which all this is pruned, once; the update is trained on.
        keep_sparse (`bool`):
            Whether merging masks the update, too.
        seed (`int`):
            Seed of the support, and of `A`.
        total_steps (`int`, *optional*):
            Number of optimizer steps of the training. `PruningCallback` fills it in.

    Example:

        ```py
        >>> from peft_prune import DSEEConfig

        >>> config = DSEEConfig(task_type="SEQ_CLS", r=16, num_sparse=64, sparsity=0.5)
        ```
    """

    r: int = field(default=16, metadata={"help": "Rank of the low-rank update."})
    lora_alpha: float = field(default=16.0, metadata={"help": "The update is scaled by lora_alpha / r."})
    lora_dropout: float = field(default=0.0, metadata={"help": "Dropout before the update."})
    num_sparse: int = field(default=64, metadata={"help": "Trained places of each matrix."})
    support: str = field(default="grebsmo", metadata={"help": "'grebsmo', 'random' or 'magnitude'."})
    prune_target_modules: Optional[Union[list[str], str]] = field(
        default=None, metadata={"help": "Modules to prune; by default the linear layers inside the numbered blocks."}
    )
    update_sparsity: Optional[float] = field(default=None, metadata={"help": "Sparsity of modules with update."})
    importance: str = field(default="update", metadata={"help": "'update', 'effective' or 'weight'."})
    heads_to_prune: int = field(default=0, metadata={"help": "Heads that go in each layer."})
    neuron_sparsity: float = field(default=0.0, metadata={"help": "Share of the neurons that goes."})
    prune_at: float = field(default=0.5, metadata={"help": "Share of training at which it is pruned, once."})
    keep_sparse: bool = field(default=False, metadata={"help": "Whether merging masks the update, too."})
    seed: int = field(default=0, metadata={"help": "Seed of the support and of A."})

    total_steps: Optional[int] = field(default=None, metadata={"help": "Optimizer steps of the training."})

    def __post_init__(self, density=None):
        if self.sparsity is None and density is None:
            self.sparsity = 0.0
        super().__post_init__(density)
        self.peft_type = PeftType("DSEE")
        if isinstance(self.prune_target_modules, list):
            self.prune_target_modules = set(self.prune_target_modules)  # type: ignore[assignment]
        check_choice("support", self.support, SUPPORTS)
        check_choice("importance", self.importance, IMPORTANCES)
        for name, least in (("r", 1), ("num_sparse", 0), ("heads_to_prune", 0), ("seed", 0)):
            check_whole(name, getattr(self, name), least)
        check_number("lora_alpha", self.lora_alpha, 0.0, 1e9, "LoRA's usual choice is r or 2r.")
        check_number("lora_dropout", self.lora_dropout, 0.0, 1.0, "Try 0.1.", open_high=True)
        check_number("neuron_sparsity", self.neuron_sparsity, 0.0, 1.0, "The paper uses 0.4.", open_high=True)
        if self.update_sparsity is not None:
            check_number("update_sparsity", self.update_sparsity, 0.0, 1.0, "Try 0.5.", open_high=True)
        check_number("prune_at", self.prune_at, 1e-9, 1.0, "It is a share of training, e.g. 0.5.")
        if self.total_steps is not None:
            check_whole("total_steps", self.total_steps, 1)

    def to_dict(self) -> dict[str, Any]:
        """As for every config, with sets as lists, for JSON."""
        fields = super().to_dict()
        if isinstance(fields.get("prune_target_modules"), set):
            fields["prune_target_modules"] = sorted(fields["prune_target_modules"])
        return fields

    def prunes(self, module_name: str) -> bool:
        """Whether a module is among those that are pruned."""
        return self.prune_target_modules is not None and bool(is_target(self, module_name, "prune_target_modules"))

    def updates(self, module_name: str) -> bool:
        """Whether a module is among those that are updated."""
        return bool(is_target(self, module_name))

    def final_step(self, total_steps: int) -> int:
        """Optimizer step at which it is pruned, once."""
        return math.ceil(round(self.prune_at * total_steps, 6))  # 0.55 of 100 is 55, not the next above 55.000…01

    def recipe(self) -> Recipe:
        """The size of the update; the smallest go, and heads and neurons; low rank and sparse places; once."""
        sparsity = float(self.sparsity or 0)
        update_sparsity = sparsity if self.update_sparsity is None else self.update_sparsity
        return Recipe(
            OfUpdate(self.importance),
            Smallest(sparsity, update_sparsity, self.heads_to_prune, self.neuron_sparsity),
            LowRank(
                self.r, self.lora_alpha, self.lora_dropout, self.num_sparse, self.support, self.seed,
                random=not self.init_weights,
            ),
            Moment.ONCE,
        )  # fmt: skip


class DSEEModel(PruningModel):
    """
    DSEE: a low-rank and a sparse update on a model that is pruned once.

    Args:
        model ([`~transformers.PreTrainedModel`]): the model to adapt.
        config ([`DSEEConfig`]): the configuration.
        adapter_name (`str`): name of the adapter, `"default"` by default.

    Example:

        ```py
        >>> from transformers import AutoModelForSequenceClassification
        >>> from peft import get_peft_model
        >>> from peft_prune import DSEEConfig

        >>> base_model = AutoModelForSequenceClassification.from_pretrained("bert-base-uncased")
        >>> model = get_peft_model(base_model, DSEEConfig(task_type="SEQ_CLS", sparsity=0.5))
        ```
    """

    prefix = "dsee_"
    layer_classes = LAYER_CLASSES  # the update is of linear layers

    def _prepare_adapter_config(self, peft_config: Any, model_config: dict) -> Any:
        if peft_config.target_modules is None:
            peft_config.target_modules = self._queries_and_values(model_config)
        if peft_config.prune_target_modules is None:
            try:
                peft_config.prune_target_modules = default_target_modules(self.model)
            except ValueError:  # no numbered blocks: what the user has named is all there is to go by
                peft_config.prune_target_modules = peft_config.target_modules
        return peft_config

    def _queries_and_values(self, model_config: dict) -> Any:
        """Names of the projections of queries and values; where the anatomy is not known, LoRA's default targets."""
        try:
            sites = find_sites(self.model)
        except ValueError as error:
            names = LORA_TARGETS.get(model_config.get("model_type", ""))
            if names is None:
                raise ValueError(
                    "Please specify `target_modules`, the modules to update. By default these are queries and values, "
                    f"which were not found. {error}"
                ) from error
            return names if isinstance(names, str) else set(names)  # a string is a regular expression
        return {name for site in sites if site.attention for name in (site.attention.query, site.attention.value)}

    def _prepare_model(self, peft_config: Any, model: nn.Module) -> None:
        # the fields that PEFT reads, with those that are pruned in the place of those that are updated
        pruned: Any = copy.copy(peft_config)
        pruned.target_modules = peft_config.prune_target_modules
        pruned = include_all_linear(pruned, model)
        peft_config.prune_target_modules = pruned.target_modules
        super()._prepare_model(peft_config, model)
        self._check_sizes(peft_config, model)
        if not any(peft_config.prunes(name) for name in self._find_targets(peft_config, model)):
            raise ValueError(
                f"prune_target_modules={peft_config.prune_target_modules!r} matches no module of the base model. "
                "Correct the names, or leave it out to prune the linear layers inside the numbered blocks."
            )

    def _check_sizes(self, config: DSEEConfig, model: nn.Module) -> None:
        """An update is no larger than the matrix; a config from a stranger may ask for more than there is memory."""
        for name, layer in self._find_targets(config, model).items():
            if not config.updates(name):
                continue
            if config.r > max(layer.shape):
                raise ValueError(
                    f"r={config.r!r} is above both sides of {name!r}, {layer.shape}. Use a rank below the smaller one."
                )
            if config.num_sparse > layer.shape[0] * layer.shape[1]:
                raise ValueError(
                    f"num_sparse={config.num_sparse!r} is more than the {layer.shape[0] * layer.shape[1]} weights of "
                    f"{name!r}. Use fewer places."
                )

    @staticmethod
    def _check_target_module_exists(peft_config: Any, key: str) -> Any:
        return peft_config.updates(key) or peft_config.prunes(key)

    def _of_host(self, config: Any, name: str) -> dict[str, Any]:
        updated = config.updates(name)
        return {
            "updated": updated,
            "pruned": config.prunes(name),
            "rows": self._rows_of(name) if updated else None,
        }

    def _rows_of(self, name: str) -> Optional[torch.Tensor]:
        """Of a fused projection, the rows of queries and values; `None` for all rows."""
        try:
            sites = find_sites(self.model)
        except ValueError:
            return None  # an architecture that is not known has no fused matrix that is
        for site in sites:
            if site.kind == HEADS and site.attention is not None and site.attention.fused and name in site.rows:
                rows, width = site.rows[name], site.width
                return torch.cat([rows[:, :width], rows[:, 2 * width :]], dim=1).flatten().sort().values
        return None

    def merge_and_unload(
        self,
        progressbar: bool = False,
        safe_merge: bool = False,
        adapter_names: Optional[list[str]] = None,
        shrink: Optional[bool] = None,
        keep_sparse: Optional[bool] = None,
        inputs: Optional[dict[str, Any]] = None,
    ) -> nn.Module:
        """Merge masks and updates, and return the base model, without the heads and neurons that are gone.

        Args:
            progressbar, safe_merge, adapter_names, shrink: as for [`PruningModel.merge_and_unload`].
            keep_sparse (`bool`, *optional*): mask the update, too, so that merged weights are as sparse as the masks.
                The model's outputs change then. By default what the config says, `False`.
            inputs (`dict`, *optional*): a batch, with which the change of the outputs is measured and logged.
        """
        with active_for_merge(self, adapter_names) as names, _sparse(self.peft_config, names, keep_sparse):
            before = self._outputs(self.model, inputs)
            lost = self._lost_by_masking(names)
            merged = super().merge_and_unload(progressbar, safe_merge, adapter_names, shrink)
        if lost:
            message = f"keep_sparse=True removed {lost:.2%} of the norm of the update."
            after = self._outputs(merged, inputs)
            if before is not None and after is not None:
                message += f" The outputs moved by {float((after - before).abs().max()):.3g} at most."
            _logger.warning(message)
        return merged

    def _outputs(self, model: nn.Module, inputs: Optional[dict[str, Any]]) -> Optional[torch.Tensor]:
        if inputs is None:
            return None
        with torch.no_grad():
            return cast(Any, model)(**inputs)[0].float()

    def _lost_by_masking(self, names: Sequence[str]) -> float:
        """Share of the update's norm that falls on pruned weights and is about to be masked."""
        whole = gone = 0.0
        for layer in pruning_layers(self):
            for name in names:
                if name in layer.host and layer.config(name).keep_sparse:
                    change = layer.delta(name).detach()
                    whole += float(change.square().sum())
                    gone += float(change[~layer.get_mask(name)].square().sum())
        return (gone / whole) ** 0.5 if whole else 0.0


@contextmanager
def _sparse(configs: dict[str, Any], names: Sequence[str], keep_sparse: Optional[bool]) -> Iterator[None]:
    """While this is entered, adapters have another `keep_sparse`; what their configs say is put back."""
    before = {name: configs[name].keep_sparse for name in names}
    try:
        for name in names if keep_sparse is not None else ():
            configs[name].keep_sparse = keep_sparse
        yield
    finally:
        for name, said in before.items():
            if name in configs:
                configs[name].keep_sparse = said


register_method(name="dsee", config_cls=DSEEConfig, model_cls=DSEEModel)
