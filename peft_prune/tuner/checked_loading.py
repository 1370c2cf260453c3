"""Checks at three places where adapters are loaded past the tuner.

PEFT looks up `peft_type` before a class of ours is reached, and says no more than `KeyError`. `PeftModel.load_adapter`
under a name that is there (as `Trainer` resumes) reads no config and so knows no checksums, and of a missing
`modules_to_save` it says no more than `KeyError`. Transformers' `model.load_adapter` calls no hook of the tuner after
it has read the file. Final masks of the active adapter are decoded after both.
"""

from __future__ import annotations

from typing import Any

import torch
from peft import PeftConfig, PeftModel
from transformers import PreTrainedModel

from ..config import PruningConfig
from ..config_record import DAMAGED, PREFIX
from ..layers.layer import PruningLayer, pruning_layers
from ..peft_api import PEFT_TYPE_TO_CONFIG_MAPPING, AuxiliaryTrainingWrapper, PeftConfigMixin, replace_method
from ..storage.checksums import check_no_nan, check_tensor
from ..storage.codec import MaskFormatError


def check_when_loaded() -> None:
    """Have both ways of loading check a pruning adapter; others are not touched."""
    replace_method(PeftConfigMixin, "from_json_file", _read)
    replace_method(PeftModel, "load_adapter", _by_peft)
    replace_method(PreTrainedModel, "load_adapter", _by_transformers)


def _read(original: Any) -> Any:
    def from_json_file(cls: Any, path_json_file: str, **kwargs: Any) -> Any:
        fields = original(cls, path_json_file, **kwargs)
        if not isinstance(fields, dict):
            raise ValueError(f"{path_json_file} holds no dict of fields. {DAMAGED}")
        name = fields.get("peft_type")
        method = PEFT_TYPE_TO_CONFIG_MAPPING.get(name) if isinstance(name, str) else None  # type: ignore[call-overload]
        if "mask_format" in fields and not (method and issubclass(method, PruningConfig)):
            raise ValueError(
                f"peft_type={name!r:.80} is not a pruning method, but {path_json_file} belongs to one. {DAMAGED}"
            )
        return fields

    return from_json_file


def _by_peft(original: Any) -> Any:
    def load_adapter(self: Any, model_id: Any, adapter_name: str, *args: Any, **kwargs: Any) -> Any:
        config = self.peft_config.get(adapter_name)
        if isinstance(config, PruningConfig) and config.checksums is None and config.check_tensors:
            config.checksums = _checksums_of(config, model_id, kwargs)
        try:
            loaded = original(self, model_id, adapter_name, *args, **kwargs)
        except KeyError as error:
            if not isinstance(self.peft_config.get(adapter_name), PruningConfig):
                raise
            raise MaskFormatError(f"The adapter file holds no {error}. {DAMAGED}") from error
        finally:
            if isinstance(config, PruningConfig):
                config.checksums = None  # of this file, and not of the next one
        _decode(self, adapter_name)
        return loaded

    return load_adapter


def _decode(model: Any, adapter_name: str) -> None:
    for layer in pruning_layers(model, adapter_name):
        layer.decode_if_active(adapter_name)


def _checksums_of(config: PruningConfig, model_id: Any, kwargs: dict[str, Any]) -> Any:
    """Checksums of the tensors of another state of an adapter, whose config is otherwise not read."""
    names = ("subfolder", "revision", "token", "cache_dir", "local_files_only")
    try:
        other = PeftConfig.from_pretrained(model_id, **{key: kwargs[key] for key in names if key in kwargs})
    except (OSError, ValueError) as error:
        if isinstance(error, ValueError) and "Can't find" not in str(error):
            raise
        return None  # a file without its config
    same = isinstance(other, PruningConfig) and other.finalized == config.finalized
    return other.checksums if same and other.check_tensors else None  # type: ignore[attr-defined]


def _by_transformers(original: Any) -> Any:
    def load_adapter(self: Any, *args: Any, **kwargs: Any) -> Any:
        before = set(getattr(self, "peft_config", {}))
        loaded = original(self, *args, **kwargs)
        given = kwargs.get("adapter_state_dict") is not None  # which belongs to no file
        for name, config in getattr(self, "peft_config", {}).items():
            if name not in before and isinstance(config, PruningConfig):
                if not given:
                    _check_in_place(self, name, config)
                for layer in pruning_layers(self, name):
                    layer.after_loading([])
                _decode(self, name)
        return loaded

    return load_adapter


def _check_in_place(model: Any, adapter_name: str, config: PruningConfig) -> None:
    """Compare tensors with their records where they have arrived; one that was converted to another dtype cannot be."""
    record = (config.checksums or {}).get("tensors", {})
    config.checksums = None
    if not config.check_tensors:
        return
    for key, tensor in _held(model, adapter_name).items():
        fix = f"Remove it with model.delete_adapter({adapter_name!r}). {DAMAGED}"
        check_no_nan(key, tensor, fix)
        info = record.get(key)
        if info is not None and (tensor.dtype == getattr(torch, info["dtype"], None) or not tensor.is_floating_point()):
            check_tensor(key, tensor, info, fix)


def _held(model: Any, adapter_name: str) -> dict[str, torch.Tensor]:
    """Tensors of an adapter by their key in a file, without PEFT's prefix."""
    found: dict[str, torch.Tensor] = {}
    for name, module in model.named_modules():
        name = name.removeprefix(PREFIX)
        if isinstance(module, PruningLayer):
            for kind in (*module.trained_names, *module.stored_names):
                if adapter_name in module.held(kind):
                    found[f"{name}.{module.prefix}{kind}"] = module.held(kind)[adapter_name]
        elif isinstance(module, AuxiliaryTrainingWrapper):
            states = module.state_dict()
            for key, place in module.adapter_state_dict_load_map(adapter_name).items():
                found[f"{name}.{key}"] = states[place]
    return {key: tensor for key, tensor in found.items() if not tensor.is_meta}
