"""The tuner that all pruning methods share: finds the targets, checks them, puts the layers in place."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext
from functools import partial
from typing import Any, Optional, cast

import torch
from torch import nn

from ..config import PruningConfig
from ..layers.convolution import CONVOLUTIONS
from ..layers.embedding import PrunedEmbedding
from ..layers.layer import PruningLayer, pruning_layers
from ..layers.linear import LAYER_CLASSES, layer_class_for
from ..layers.masks import not_calibrated
from ..layers.quantized import PrunedQuantizedLinear
from ..layers.sharding import unsplit, without_shards
from ..layers.watch import warn_once
from ..matching import is_target
from ..peft_api import AuxiliaryTrainingWrapper, BaseTuner, BaseTunerLayer, include_all_linear
from ..recipe import Moment
from ..selection.granularity import Granularity, parse_granularity
from ..stages.schedule import update_schedule
from ..stages.sparsity_reached import sparsity, warn_if_unreachable
from .adapter_names import check_adapter_name, warn_if_nothing_trains
from .combine import add_combined_adapter
from .experts import tell_experts
from .file_checks import check_file, check_label_words, note_tensors
from .heads import head_granularity
from .load_checks import check_base_weights, check_finite, check_has_zeros, check_stored_state, check_targets
from .load_modules import check_saved_modules, taken_back_on_error
from .mixed_batch import routed
from .refusals import check_no_weight_is_shared, check_patterns, check_place, parents_of_modules, refuse
from .targets import IN_BLOCK, default_target_modules
from .unloading import active_for_merge, merge_and_shrink
from .verbalizer import install_verbalizer, keep_label_words


class PruningModel(BaseTuner):
    """
    Base of the tuners. A method's own model is this class with a `prefix`, and with what is its own if anything is.

    Args:
        model (`torch.nn.Module`): the model to prune.
        config ([`PruningConfig`]): the configuration.
        adapter_name (`str`): name of the adapter, `"default"` by default.
    """

    tuner_layer_cls = PruningLayer
    layer_classes: Mapping[type[nn.Module], type[PruningLayer]] = {
        **LAYER_CLASSES,
        **CONVOLUTIONS,
        nn.Embedding: PrunedEmbedding,
    }
    quantized_layer_class: Optional[type[PruningLayer]] = PrunedQuantizedLinear
    target_module_mapping: dict[str, list[str]] = {}

    def update_schedule(self, step: int, total_steps: Optional[int] = None) -> dict[str, float]:
        """[`peft_prune.update_schedule`] as a method, where users of AdaLoRA look for it: `model.base_model`."""
        return update_schedule(self, step, total_steps)

    # -------------------------------------------------------------- preparation

    def _prepare_adapter_config(self, peft_config: Any, model_config: dict) -> Any:
        tell_experts(self.model, peft_config)
        if peft_config.target_modules is None and peft_config.granularity == "head":
            matches = [IN_BLOCK.fullmatch(name) for name in head_granularity(self.model)]
            peft_config.target_modules = {match["suffix"] for match in matches if match}
        elif peft_config.target_modules is None:
            peft_config.target_modules = default_target_modules(self.model)
        return peft_config

    def _prepare_model(self, peft_config: Any, model: nn.Module) -> None:
        """Check everything that can be known before the first module is replaced."""
        config = cast(PruningConfig, include_all_linear(peft_config, model))
        targets = self._targets = self._find_targets(config, model)
        if not targets:
            return  # PEFT raises with the details
        for name, granularity in self._granularities(config, targets).items():
            granularity.check_shape(name, targets[name].shape)
        recipe = config.recipe()
        check_patterns(getattr(config, "sparsity_pattern", None) or {}, list(targets))
        if not config.finalized:
            if recipe.moment is Moment.START and config.init_weights:
                check_has_zeros(targets)
            check_finite(targets)
        if config.finalized:
            check_targets(config.mask_info or {}, targets)
            if config.check_base:
                check_base_weights(config.mask_info or {}, targets)
        if config.verbalizer:
            check_label_words(config.verbalizer, model)
            install_verbalizer(model)

    def _granularities(self, config: PruningConfig, targets: dict[str, PruningLayer]) -> dict[str, Granularity]:
        """Granularity of each module; kept for the layers that are to be made."""
        self._granularity: dict[str, Granularity]
        if config.granularity == "head":
            heads = head_granularity(self.model)
            others = [name for name in targets if name not in heads]
            if others:
                raise ValueError(
                    f"granularity='head': {others[0]!r} ({len(others)} such modules) has no rows or columns that are "
                    f"heads. Name the projections in `target_modules`, for instance {sorted(heads)[0]!r}."
                )
            self._granularity = {name: heads[name] for name in targets}
        else:
            self._granularity = dict.fromkeys(targets, parse_granularity(config.granularity))
        return self._granularity

    def _find_targets(self, config: PruningConfig, model: nn.Module) -> dict[str, PruningLayer]:
        """Every module that will be pruned, by name: the layer that is there, or one that could take its place."""
        targets: dict[str, PruningLayer] = {}
        inside: tuple[str, ...] = ()
        sees_inputs = config.recipe().needs_activations
        parents = parents_of_modules(model)
        for name, module in model.named_modules():
            if not name or (inside and name.startswith(inside)):
                continue
            if isinstance(module, BaseTunerLayer):
                inside += (name + ".",)
            if not self._check_target_module_exists(config, name):
                continue
            targets[name] = module if self._is_own(module) else self._layer_for(module, name)
            if sees_inputs and not targets[name].columns_are_inputs:
                raise refuse(module, name, LAYER_CLASSES)
            check_place(model, name, parents[id(module)])
        return targets

    # ---------------------------------------------------------------- injection

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        """As PEFT's; a name that cannot be that of an adapter raises `ValueError`, and is not registered."""
        try:
            check_adapter_name(adapter_name)
        except ValueError:
            self.peft_config.pop(adapter_name, None)
            raise
        try:
            super().inject_adapter(model, adapter_name, *args, **kwargs)
        finally:
            self._targets = {}
        warn_if_nothing_trains(model, self.peft_config[adapter_name], adapter_name)
        warn_if_unreachable(adapter_name, pruning_layers(model, adapter_name))

    @staticmethod
    def _check_target_module_exists(peft_config: Any, key: str) -> Any:
        return is_target(peft_config, key)

    def _is_own(self, module: nn.Module) -> bool:
        return isinstance(module, PruningLayer) and module.prefix == self.prefix

    def _layer_for(self, module: nn.Module, name: str) -> PruningLayer:
        layer_class = layer_class_for(module, self.layer_classes, self.quantized_layer_class)
        if layer_class is None or isinstance(module, BaseTunerLayer):
            raise refuse(module, name, self.layer_classes)
        return layer_class(unsplit(name, module), self.prefix, name)

    def _create_and_replace(  # type: ignore[override]
        self,
        peft_config: Any,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        **optional_kwargs: Any,
    ) -> None:
        how = {"inference_mode": peft_config.inference_mode, "granularity": self._granularity.get(current_key)}
        how |= self._of_host(peft_config, current_key)
        if self._is_own(target):
            cast(PruningLayer, target).update_layer(adapter_name, peft_config, **how)
            return
        made = self._targets.pop(current_key, None)  # when it was checked
        layer = made if made is not None and made.base_layer is target else self._layer_for(target, current_key)
        layer.set_adapter(self.active_adapters)
        layer.update_layer(adapter_name, peft_config, **how)
        if adapter_name not in self.active_adapters:
            layer.requires_grad_(False)
        self._replace_module(parent, target_name, layer, target)

    def _of_host(self, config: PruningConfig, name: str) -> dict[str, Any]:
        """Fields of a module's [`Host`] that are not at their defaults, for methods."""
        return {}

    def _replace_module(self, parent: Any, child_name: str, new_module: Any, child: Any) -> None:
        if isinstance(child, AuxiliaryTrainingWrapper) and not hasattr(new_module, "weight"):
            # `modules_to_save` may name a module without a weight of its own, such as BERT's pooler; PEFT would look
            # for one when it unloads
            setattr(parent, child_name, new_module)
        else:
            super()._replace_module(parent, child_name, new_module, child)

    # ---------------------------------------------------------------- save, load

    @classmethod
    def _get_adapter_state_dict(
        cls,
        model: nn.Module,
        config: Any,
        adapter_name: str,
        state_dict: dict[str, torch.Tensor],
        unwanted_adapter_names: list[str],
    ) -> dict[str, torch.Tensor]:
        trains = config.recipe().trained
        if not config.finalized and not trains and config.init_weights:
            raise ValueError(not_calibrated(config))
        if (
            trains
            and not config.finalized
            and not any(m.schedule_is_managed for m in model.modules() if isinstance(m, PruningLayer))
        ):
            warn_once(
                "not final",
                f"Adapter {adapter_name!r} is saved with its scores, not with masks, so that training can go on. "
                "Call peft_prune.finalize(model) first to save masks of 1 bit a weight.",
            )
        trained = [layer for layer in pruning_layers(model, adapter_name) if adapter_name in layer.progress]
        config.sparsity_when_saved = sparsity(trained, adapter_name) if trained else None
        found = super()._get_adapter_state_dict(model, config, adapter_name, state_dict, unwanted_adapter_names)
        found = without_shards(found, cls.prefix) if config.finalized else found
        note_tensors(cls, model, config, adapter_name, state_dict, found)
        return found

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: Any, adapter_name: str, state_dict: dict[str, torch.Tensor]
    ) -> dict[str, torch.Tensor]:
        """Check what was read before any of it is copied into the model."""
        stored = super()._remap_adapter_state_dict_for_load(model, config, adapter_name, state_dict)
        layers = {name: m for name, m in model.named_modules() if isinstance(m, PruningLayer)}
        with taken_back_on_error(model, adapter_name):
            check_stored_state(stored, layers, config, cls.prefix, adapter_name)
            check_saved_modules(stored, model, adapter_name)
            check_file(model, config, adapter_name, state_dict)
        return stored

    # ------------------------------------------------------------------- merge

    def merge_and_unload(
        self,
        progressbar: bool = False,
        safe_merge: bool = False,
        adapter_names: Optional[list[str]] = None,
        shrink: Optional[bool] = None,
    ) -> nn.Module:
        """Merge the masks and return the base model, without the heads and neurons that are gone.

        Args:
            progressbar (`bool`): show progress.
            safe_merge (`bool`): check first that the weights are finite.
            adapter_names (`list[str]`, *optional*): adapters to merge, by default the active ones.
            shrink (`bool`, *optional*): whether to take heads and neurons out whose weights are all zero, see
                [`peft_prune.shrink`]. By default if the method removes whole heads or neurons. It warns if asked
                for where there are none.

        Raises:
            ValueError: an adapter is not loaded; `shrink=True`, and where heads and neurons live is not known for this
                architecture.
        """
        with active_for_merge(self, adapter_names) as names:
            merge = partial(super().merge_and_unload, progressbar, safe_merge, names)
            return keep_label_words(lambda: merge_and_shrink(self, merge, names, shrink), self.model)

    # ------------------------------------------------------------- refusals

    def _check_merge_allowed(self) -> None:
        check_no_weight_is_shared(self.model, pruning_layers(self))

    # -------------------------------------------------------- several adapters

    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Any:
        adapter_names = kwargs.get("adapter_names")
        return nullcontext() if adapter_names is None else routed(self, adapter_names, kwargs)

    def add_weighted_adapter(
        self,
        adapters: list[str],
        weights: Optional[list[float]] = None,
        adapter_name: str = "combined",
        combination_type: str = "union",
    ) -> None:
        """Add an adapter whose masks are combined from those of others, as LoRA's method of that name.

        `modules_to_save` are those of the first adapter. The new adapter is not activated.

        Args:
            adapters (`list[str]`): adapters with final masks, two at least.
            weights (`list[float]`, *optional*): votes of each adapter for `"majority"`, by default one each. The other
                combinations have no use for them, and warn if they differ.
            adapter_name (`str`): name of the new adapter.
            combination_type (`str`): `"union"` (what any keeps), `"intersection"` (what all keep) or `"majority"` (what
                more than half of the votes keep).

        Raises:
            ValueError: an argument is unknown or does not fit; the message says which.
        """
        add_combined_adapter(self, adapters, weights, adapter_name, combination_type)
