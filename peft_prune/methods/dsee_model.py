"""The tuner of DSEE: some modules are updated, some are pruned, some are both."""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Optional, cast

import torch
from torch import nn

from ..layers.layer import pruning_layers
from ..layers.linear import LAYER_CLASSES
from ..peft_api import LORA_TARGETS, include_all_linear
from ..structure.sites import HEADS, find_sites
from ..tuner.experts import tell_experts
from ..tuner.model import PruningModel
from ..tuner.targets import default_target_modules
from ..tuner.unloading import active_for_merge


_logger = logging.getLogger(__name__)


class DSEEModel(PruningModel):
    """
    DSEE: a low-rank and a sparse update on a model that is pruned while they are trained.

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
        tell_experts(self.model, peft_config, "prune_target_modules")
        if peft_config.target_modules is None and peft_config.updates_what_it_prunes:
            peft_config.target_modules = peft_config.prune_target_modules or default_target_modules(self.model)
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

    def _check_sizes(self, config: Any, model: nn.Module) -> None:
        """An update is no larger than the matrix; a config from a stranger may ask for more than there is memory."""
        for name, layer in self._find_targets(config, model).items():
            if not config.updates(name):
                continue
            if config.r > 16 * max(layer.shape):
                raise ValueError(
                    f"r={config.r!r} is far above both sides of {name!r}, {layer.shape}. Use a rank below the smaller "
                    "one."
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
