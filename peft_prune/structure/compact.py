"""Saving and loading models from which heads, neurons and whole layers were taken out."""

from __future__ import annotations

import os
from typing import Any, Optional

import transformers
from torch import nn
from transformers import AutoConfig, PretrainedConfig, PreTrainedModel
from transformers.models.auto.auto_factory import _get_model_class

from .anatomy import Anatomy
from .depth import find_stack, has_stack
from .per_layer import PER_LAYER
from .record import FIELD, read_record
from .seal import SEAL, check_seal
from .shrink import keep_units
from .sites import find_sites


# what reading the config takes out of the arguments, and loading the weights needs as well
_OF_MODEL_TOO = (
    "revision", "subfolder", "token", "cache_dir", "local_files_only", "force_download", "proxies",
    "trust_remote_code", "attn_implementation", "dtype", "torch_dtype",
)  # fmt: skip


def save_compact(model: nn.Module, save_directory: str | os.PathLike, **kwargs: Any) -> None:
    """Save a compact model: `model.safetensors`, and a `config.json` that records what was removed.

    It is the model's own `save_pretrained`, after a look whether there is anything to record. `Trainer` and
    `model.push_to_hub(...)` save what [`load_compact`] loads, too.

    Args:
        model (`PreTrainedModel`): a model after [`shrink`] or `merge_and_unload()`, perhaps trained further.
        save_directory (`str` or `os.PathLike`): folder to write.
        **kwargs: passed on to `save_pretrained`, for instance `push_to_hub=True`.

    Raises:
        TypeError: the model is none of Transformers'.
        ValueError: nothing was removed from it.
    """
    if not isinstance(model, PreTrainedModel):
        raise TypeError(
            f"save_compact needs a Transformers model, not {type(model).__name__}. Of a PeftModel save what "
            "model.merge_and_unload() returns."
        )
    if not getattr(model.config, FIELD, None):
        raise ValueError(
            "Nothing was taken out of this model, so there is nothing compact about it. Use model.save_pretrained, or "
            "peft_prune.shrink(model) first."
        )
    model.save_pretrained(save_directory, **kwargs)


def load_compact(
    pretrained_model_name_or_path: str | os.PathLike,
    model_class: Any = None,
    anatomy: Optional[Anatomy] = None,
    check_tensors: bool = True,
    **kwargs: Any,
) -> PreTrainedModel:
    """Load a compact model.

    Args:
        pretrained_model_name_or_path (`str` or `os.PathLike`): folder or Hub id.
        model_class (`type`, *optional*): class of the model or an `AutoModelFor...`, by default the class that was
            saved.
        anatomy (`tuple[Block, ...]`, *optional*): by default what is registered for the architecture.
        check_tensors (`bool`): compare tensors and config with their checksums. `False` if you edited them on purpose.
        **kwargs: passed on to `from_pretrained`: `dtype`, `device_map`, `revision`, `token`, ...; and fields of the
            model's config, such as `num_labels`.

    Raises:
        ValueError: the model is not compact, its class is not known, or its record does not fit.
        MaskFormatError: a tensor is not the one that was saved.
    """
    if check_tensors:
        check_seal(pretrained_model_name_or_path, kwargs)
    config = kwargs.pop("config", None)
    if config is None:
        both = {name: value for name, value in kwargs.items() if name in _OF_MODEL_TOO}
        config, kwargs = AutoConfig.from_pretrained(pretrained_model_name_or_path, return_unused_kwargs=True, **kwargs)
        kwargs |= both
    record = getattr(config, FIELD, None)
    if not isinstance(record, dict) or not record:
        raise ValueError(
            f"{pretrained_model_name_or_path} is no compact model: its config has no {FIELD!r}. Load it with "
            "from_pretrained."
        )
    setattr(config, SEAL, None)  # of these files, and not of what is saved next
    config.__dict__.pop(PER_LAYER, None)
    for entry in record.values():
        read_record(entry)  # raises
    original = resolve_class(config, model_class)

    def init(self: Any, config: PretrainedConfig, *args: Any, **init_kwargs: Any) -> None:
        original.__init__(self, config, *args, **init_kwargs)
        _keep_recorded(self, record, anatomy)

    # Transformers' own loading (shards, devices, dtypes, Hub) into a model that is compact from the start
    compact: Any = type(original.__name__, (original,), {"__init__": init, "__module__": original.__module__})
    loaded = compact.from_pretrained(pretrained_model_name_or_path, config=config, **kwargs)
    model = loaded[0] if isinstance(loaded, tuple) else loaded  # output_loading_info=True
    model.__class__ = original
    return loaded


def resolve_class(config: PretrainedConfig, model_class: Any) -> type[PreTrainedModel]:
    """The class that a saved model is loaded as.

    Args:
        config (`PretrainedConfig`): its config, whose `architectures` counts where no class is given.
        model_class (`type`, *optional*): a class, or an `AutoModelFor...`.

    Raises:
        ValueError: the config names no class of Transformers.
    """
    if model_class is not None and hasattr(model_class, "_model_mapping"):
        return _get_model_class(config, model_class._model_mapping)
    if model_class is not None:
        return model_class
    names = config.architectures
    one = names[0] if isinstance(names, list) and len(names) == 1 else None
    found = getattr(transformers, one, None) if isinstance(one, str) else None
    if not (isinstance(found, type) and issubclass(found, PreTrainedModel)):
        raise ValueError(
            f"The config's architectures={names!r} name no model class of Transformers. Give a `model_class`, "
            "such as AutoModelForSequenceClassification."
        )
    return found


def _keep_recorded(model: nn.Module, record: dict[str, Any], anatomy: Optional[Anatomy]) -> None:
    """Make a model of the dense sizes compact, by the record of one that is."""
    sites = {site.key: site for site in find_sites(model, anatomy)}
    stack = find_stack(model, anatomy) if has_stack(model, anatomy) else None
    kept, of_stack = {}, {}
    for key, entry in record.items():
        units = read_record(entry)
        if stack is not None and key == stack.key:
            _check(key, "kept layers", len(units), len(stack.blocks), model)
            of_stack[key] = entry
        else:
            _check(key, "units", entry["units"], sites[key].units if key in sites else None, model)
            kept[sites[key].output] = units
    setattr(model.config, FIELD, of_stack)  # the rest is written anew
    keep_units(model, kept, anatomy)


def _check(key: str, what: str, recorded: int, found: Optional[int], model: nn.Module) -> None:
    if recorded != found:
        there = "is not there" if found is None else f"has {found}"
        raise ValueError(
            f"{FIELD}: the record is of {recorded} {what} at {key!r}, which {there} in {type(model).__name__}. The "
            "model's config.json is damaged, or `model_class` is the wrong one."
        )
