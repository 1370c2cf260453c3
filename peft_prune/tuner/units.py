"""The tuner of methods that remove heads and neurons: which modules they end in, and what can be trained afterwards."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import nn

from ..layers.layer import PruningLayer
from ..layers.linear import LAYER_CLASSES
from ..peft_api import ALL_LINEAR, ModulesToSaveWrapper
from ..selection.granularity import BlockGranularity, Granularity
from ..structure.sites import find_sites
from .model import PruningModel


class UnitPruningModel(PruningModel):
    """
    Base of the tuners that remove heads and neurons. A method's own model is this class with a `prefix`.

    The mask of a removed head or neuron is on its columns of the output projection or of the second feed-forward
    matrix; `merge_and_unload()` takes its rows out of the other matrices, too.

    Args:
        model ([`~transformers.PreTrainedModel`]): the model to prune.
        config ([`UnitsConfig`]): the configuration.
        adapter_name (`str`): name of the adapter, `"default"` by default.
    """

    layer_classes = LAYER_CLASSES  # heads and neurons end in linear layers
    quantized_layer_class = None  # and go for good

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        model = args[0] if args else kwargs["model"]
        self._were_trainable = [p for p in model.parameters() if p.requires_grad]
        super().__init__(*args, **kwargs)

    def merge_and_unload(self, *args: Any, **kwargs: Any) -> nn.Module:
        """As for every method, see [`PruningModel.merge_and_unload`]; and the model can be trained as before.

        PEFT freezes the base model, for good. But a model is pruned by this method in order to fine-tune what is left.
        """
        for parameter in self._were_trainable:
            parameter.requires_grad_(True)
        # of an adapter that was loaded, the copies that take the place of the classifier and the like are frozen
        wrappers = {n: m for n, m in self.model.named_modules() if isinstance(m, ModulesToSaveWrapper)}
        trainable = [
            f"{name}.{key}"
            for name, wrapper in wrappers.items()
            for key, parameter in wrapper.original_module.named_parameters()
            if parameter.requires_grad
        ]
        model = super().merge_and_unload(*args, **kwargs)
        for name in trainable:
            model.get_parameter(name).requires_grad_(True)
        return model

    def _prepare_adapter_config(self, peft_config: Any, model_config: dict) -> Any:
        targets = peft_config.target_modules
        # "all-linear" is all there is to prune here
        if targets is None or isinstance(targets, str) and targets.lower() == ALL_LINEAR:
            # below the block, so that `layers_to_transform` applies
            peft_config.target_modules = {site.output.removeprefix(site.block + ".") for site in find_sites(self.model)}
        return peft_config

    def _prepare_model(self, peft_config: Any, model: nn.Module) -> None:
        self._sites = find_sites(model)
        outputs = {site.output for site in self._sites}
        others = [name for name in self._find_targets(peft_config, model) if name not in outputs]
        if others:
            raise ValueError(
                f"target_modules: {others[0]!r} ({len(others)} such modules) is not where heads or neurons end, and "
                f"this method removes only those. Remove it from the list; {sorted(outputs)[0]!r} is one that can be "
                "pruned."
            )
        if not peft_config.finalized:
            peft_config.recipe().rule.check_base(model, self._find_targets(peft_config, model))
        super()._prepare_model(peft_config, model)

    def _granularities(self, config: Any, targets: Mapping[str, PruningLayer]) -> dict[str, Granularity]:
        """The columns of one head or neuron, for each module."""
        self._by_output = {site.output: site for site in self._sites}
        self._granularity = {name: BlockGranularity(0, self._by_output[name].width) for name in targets}
        return self._granularity

    def _of_host(self, config: Any, name: str) -> dict[str, Any]:
        return {"units": self._by_output[name].columns}

    def _create_and_replace(  # type: ignore[override]
        self, peft_config: Any, adapter_name: str, target: nn.Module, target_name: str, parent: nn.Module,
        current_key: str, **optional_kwargs: Any,
    ) -> None:  # fmt: skip
        super()._create_and_replace(
            peft_config, adapter_name, target, target_name, parent, current_key, **optional_kwargs
        )
        if not peft_config.init_weights and not peft_config.finalized:
            site = self._by_output[current_key]
            layer = cast(PruningLayer, getattr(parent, target_name))
            layer.start_bits(adapter_name, _random_columns(layer.shape, site.columns, peft_config.keep_ratio))


def _random_columns(shape: tuple[int, int], units: torch.Tensor, keep_ratio: float) -> torch.Tensor:
    """A mask (bool, shape (out, in)) that keeps a random choice of units: at least one, and if there are two, not all.

    Args:
        shape (`tuple[int, int]`): (out, in).
        units (`torch.Tensor`): int64, shape (units, columns of a unit).
        keep_ratio (`float`): share of the units that stays.
    """
    count = max(1, min(round(keep_ratio * len(units)), len(units) - 1))
    columns = torch.zeros(shape[1], dtype=torch.bool)
    columns[units[torch.randperm(len(units))[:count]].flatten()] = True
    return columns.expand(shape)
