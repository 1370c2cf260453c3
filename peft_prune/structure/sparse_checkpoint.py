"""Models with many zeros, small on disk: masks and kept values instead of matrices."""

from __future__ import annotations

import copy
import math
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn
from transformers import AutoConfig, GenerationConfig, PreTrainedModel
from transformers.utils import cached_file

from ..storage.checksums import check_no_nan, check_tensor, describe_tensor, is_tensor_record
from ..storage.codec import (
    VERSION,
    MaskFormatError,
    describe_mask,
    describe_values,
    encode_mask,
    is_mask_info,
    load_mask,
    load_values,
)
from ..storage.values import VALUE_DTYPES, encode_values
from .compact import resolve_class
from .record import FIELD


SPARSE = "peft_prune_sparse"  # of the model's config
FILE = "sparse_model.safetensors"  # no name that from_pretrained would take for a whole model
_FORMATS = (3, VERSION)  # of masks
_MASK, _VALUES = ".peft_prune_mask", ".peft_prune_values"
_FIX = "The file is damaged, or belongs to another config.json. Download or save it again."


def save_sparse(model: nn.Module, save_directory: str | os.PathLike) -> dict[str, int]:
    """Save a merged model whose matrices hold many zeros: of each, a mask at its entropy and the values that are kept.

    A matrix is stored as it is where that is shorter. Values keep their dtype, so that [`load_sparse`] gives the same
    model, bit for bit.

    Args:
        model (`PreTrainedModel`): a model without adapters, such as `merge_and_unload()` returns.
        save_directory (`str` or `os.PathLike`): folder to write: `sparse_model.safetensors` and `config.json`.

    Returns:
        `dict[str, int]`: `bytes` of the file, and `dense_bytes` that the weights take otherwise.

    Raises:
        TypeError: the model is none of Transformers'.
        ValueError: heads or neurons were taken out of it, or no matrix has enough zeros to be worth it.
    """
    if not isinstance(model, PreTrainedModel):
        raise TypeError(
            f"save_sparse needs a Transformers model, not {type(model).__name__}. Of a PeftModel save what "
            "model.merge_and_unload() returns."
        )
    if getattr(model.config, FIELD, None):
        raise ValueError("save_sparse: heads or neurons were taken out of this model. Use save_compact.")
    stored: dict[str, torch.Tensor] = {}
    masks, others, dense = {}, {}, 0
    for name, tensor in _distinct(model):
        dense += tensor.numel() * tensor.element_size()
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise ValueError(f"save_sparse: {name!r} holds values that are not finite.")
        found = _sparse_form(tensor)
        if found is None:
            stored[name], others[name] = tensor, describe_tensor(tensor)
        else:
            masks[name], stored[name + _MASK], stored[name + _VALUES] = found
    if not masks:
        raise ValueError("save_sparse: no matrix has enough zeros for this to be shorter. Use model.save_pretrained.")
    folder = Path(save_directory)
    folder.mkdir(parents=True, exist_ok=True)
    save_file(stored, folder / FILE, metadata={"format": "pt"})
    config = copy.deepcopy(model.config)
    config.architectures = [type(model).__name__]
    setattr(config, SPARSE, {"format": VERSION, "masks": masks, "tensors": others})
    config.save_pretrained(folder)
    if model.can_generate() and model.generation_config is not None:
        model.generation_config.save_pretrained(folder)
    return {"bytes": (folder / FILE).stat().st_size, "dense_bytes": dense}


def load_sparse(source: str | os.PathLike, model_class: Any = None, **kwargs: Any) -> PreTrainedModel:
    """Load what [`save_sparse`] has written: an ordinary model, with its zeros.

    Args:
        source (`str` or `os.PathLike`): folder or Hub id.
        model_class (`type`, *optional*): class of the model or an `AutoModelFor...`, by default the class that was
            saved.
        **kwargs: passed on to `from_pretrained`: `dtype`, `attn_implementation`, ...; `revision`, `token` and
            `cache_dir` also say what is read from the Hub.

    Raises:
        ValueError: it is no such folder, or its class is not known.
        MaskFormatError: a tensor is not the one that was saved.
    """
    hub: dict[str, Any] = {
        key: kwargs[key] for key in ("revision", "token", "cache_dir", "local_files_only") if key in kwargs
    }
    config = AutoConfig.from_pretrained(source, **hub)
    record = config.__dict__.pop(SPARSE, None)
    if record is None:
        raise ValueError(f"{source} holds no model of save_sparse: its config has no {SPARSE!r}. Use from_pretrained.")
    _check_record(record)
    found = cached_file(str(source), FILE, _raise_exceptions_for_missing_entries=False, **hub)
    if found is None:
        raise MaskFormatError(f"{source} holds no {FILE!r}. {_FIX}")
    original: Any = resolve_class(config, model_class)
    _check_shapes(original, config, record["masks"])
    weights = dict(_read(found, record))
    kwargs.setdefault("dtype", next((w.dtype for w in weights.values() if w.is_floating_point()), None))
    model = original.from_pretrained(None, config=config, state_dict=weights, **kwargs)
    if model.can_generate() and (generation := _generation_config(source, hub)) is not None:
        model.generation_config = generation
    return model


def _generation_config(source: str | os.PathLike, hub: Mapping[str, Any]) -> Any:
    try:
        return GenerationConfig.from_pretrained(str(source), **hub)
    except OSError:
        return None


def _check_shapes(model_class: Any, config: Any, masks: Mapping[str, Any]) -> None:
    """Raise `ValueError` if a matrix is of another shape than the model's: a few bytes can unpack to any size."""
    with torch.device("meta"):
        wanted = {name: list(tensor.shape) for name, tensor in model_class(config).state_dict().items()}
    for name, info in masks.items():
        if name in wanted and info["of"] != wanted[name]:
            raise ValueError(
                f"{SPARSE}: {name!r} is recorded as {info['of']}, and {model_class.__name__} has {wanted[name]}. The "
                "config.json is damaged, or model_class is the wrong one."
            )
        if name not in wanted:
            raise ValueError(f"{SPARSE}: {model_class.__name__} has no {name!r:.200}. Is model_class the right one?")


def _distinct(model: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Tensors of the state dict on the CPU; of those that share their memory, as tied ones, the first."""
    seen: set[tuple[int, torch.Size]] = set()
    for name, tensor in model.state_dict().items():
        key = (tensor.data_ptr(), tensor.shape)
        if tensor.numel() and key in seen:
            continue
        seen.add(key)
        yield name, tensor.detach().cpu().contiguous()


def _sparse_form(tensor: torch.Tensor) -> tuple[dict[str, Any], torch.Tensor, torch.Tensor] | None:
    """Record, mask and values of a tensor as they are stored, `None` where it is shorter as it is."""
    dtype = str(tensor.dtype).removeprefix("torch.")
    if tensor.dim() < 2 or dtype not in VALUE_DTYPES or not tensor.is_floating_point():
        return None
    matrix = tensor.flatten(1)
    mask = matrix != 0
    if int(mask.sum()) > 0.98 * mask.numel():
        return None
    stored, values = encode_mask(mask), encode_values(matrix, mask, dtype)
    if stored.numel() + values.numel() >= tensor.numel() * tensor.element_size():
        return None
    info = describe_mask(stored, mask) | {"values": describe_values(values, dtype), "of": list(tensor.shape)}
    return info, stored, values


def _check_record(record: Any) -> None:
    known = isinstance(record, dict) and {"format", "masks", "tensors"} <= record.keys()
    if known and record["format"] not in _FORMATS:
        raise ValueError(f"{SPARSE}: format {record['format']!r} is not known to this version. Upgrade peft_prune.")
    masks = record["masks"] if known else None
    if not (isinstance(masks, dict) and is_tensor_record(record["tensors"])):
        raise ValueError(f"{SPARSE} of config.json is damaged. Download or save it again.")
    for name, info in masks.items():
        if not _is_sparse_record(info):
            raise ValueError(f"{SPARSE}: the record of {name!r:.200} is damaged. Download or save it again.")


def _is_sparse_record(info: Any) -> bool:
    if not is_mask_info(info) or "values" not in info or "block" in info:
        return False
    shape, (rows, columns) = info.get("of"), info["shape"]
    whole = isinstance(shape, list) and len(shape) >= 2 and all(type(n) is int and n > 0 for n in shape)
    return whole and shape[0] == rows and math.prod(shape) == rows * columns


def _read(path: str, record: Mapping[str, Any]) -> Iterator[tuple[str, torch.Tensor]]:
    """Tensors by name, each compared with its record."""
    masks, tensors = record["masks"], record["tensors"]
    wanted = {*tensors, *(name + part for name in masks for part in (_MASK, _VALUES))}
    try:
        with safe_open(path, framework="pt") as file:
            odd = sorted(wanted.symmetric_difference(file.keys()))
            if odd:
                where = "is missing from" if odd[0] in wanted else "is not expected in"
                raise MaskFormatError(f"{odd[0]!r} {where} {FILE} ({len(odd)} such tensors). {_FIX}")
            for name, info in tensors.items():
                tensor = file.get_tensor(name)
                check_tensor(name, tensor, info, _FIX)
                check_no_nan(name, tensor, _FIX)
                yield name, tensor
            for name, info in masks.items():
                mask = load_mask(name, file.get_tensor(name + _MASK), info, record["format"])
                values = load_values(name, file.get_tensor(name + _VALUES), mask, info["values"])
                yield name, values.to(getattr(torch, info["values"]["dtype"])).view(info["of"])
    except SafetensorError as error:
        raise MaskFormatError(f"{path} cannot be read: {error}. {_FIX}") from error
