"""Checksums of a compact model's files and sizes of its layers, in config.json: written by `save_pretrained`."""

from __future__ import annotations

import json
import zlib
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Optional

import torch
from safetensors import SafetensorError, safe_open
from transformers import PretrainedConfig, PreTrainedModel
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, cached_file

from ..peft_api import replace_method
from ..storage.checksums import check_no_nan, check_tensor, describe_tensor, is_tensor_record
from ..storage.codec import MaskFormatError
from .per_layer import PER_LAYER, per_layer_config
from .record import FIELD


SEAL = "peft_prune_checksums"  # of the model's config
_DAMAGED = (
    "The compact model is damaged, or was altered. Download or save it again. If you changed it on purpose, pass "
    "check_tensors=False to load_compact."
)
_FREE = (SEAL, "transformers_version")
_HUB = ("revision", "subfolder", "token", "cache_dir", "local_files_only", "force_download", "proxies")


def seal_when_saved() -> None:
    """Have `save_pretrained` of compact models record checksums; other models are not touched."""

    def make_save(original: Any) -> Any:
        def save_pretrained(self: Any, save_directory: Any, *args: Any, **kwargs: Any) -> Any:
            result = original(self, save_directory, *args, **kwargs)
            _seal(self, Path(save_directory), kwargs.get("variant"), kwargs.get("is_main_process", True))
            return result

        return save_pretrained

    def make_upload(original: Any) -> Any:
        def upload_modified_files(self: Any, working_dir: Any, *args: Any, **kwargs: Any) -> Any:
            _seal(self, Path(working_dir))
            return original(self, working_dir, *args, **kwargs)

        return upload_modified_files

    replace_method(PreTrainedModel, "save_pretrained", make_save)
    replace_method(PreTrainedModel, "_upload_modified_files", make_upload)


def _seal(model: Any, folder: Path, variant: Optional[str] = None, is_main_process: bool = True) -> None:
    path = folder / "config.json"
    if not getattr(model.config, FIELD, None) or variant or not is_main_process or not path.is_file():
        return
    config = json.loads(path.read_text(encoding="utf-8"))
    files = _files_of(folder)
    if files and config.get(FIELD):
        config |= {PER_LAYER: layers} if (layers := per_layer_config(model.config)) else {}
        tensors = {key: describe_tensor(tensor) for key, tensor in _tensors(files)}
        config[SEAL] = {"config": _config_crc32(config, tensors), "tensors": tensors}
        path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _config_crc32(config: Mapping[str, Any], tensors: Mapping[str, Any]) -> str:
    """Of all fields but versions and what begins with an underscore, which Transformers adds when it reads."""
    fields = {key: value for key, value in config.items() if key not in _FREE and not key.startswith("_")}
    return f"{zlib.crc32(json.dumps([fields, tensors], sort_keys=True).encode()):08x}"


def check_seal(source: Any, kwargs: Mapping[str, Any]) -> None:
    """Compare the files of a compact model with their checksums; of one saved by an older version there are none.

    Args:
        source (`str` or `os.PathLike`): folder or Hub id.
        kwargs (`Mapping`): arguments of `from_pretrained`, among them those that say where on the Hub.

    Raises:
        ValueError: the config was changed.
        MaskFormatError: a tensor is missing, superfluous, changed, or holds NaN.
    """
    hub = {key: kwargs[key] for key in _HUB if kwargs.get(key) is not None}
    config, _ = PretrainedConfig.get_config_dict(source, **hub)
    seal = config.get(SEAL) if isinstance(config, dict) else None
    if seal is None:
        return
    if not isinstance(seal, dict) or not is_tensor_record(seal.get("tensors")):
        raise ValueError(f"{SEAL}={seal!r:.80} of config.json must be a dict with 'config' and 'tensors'. {_DAMAGED}")
    found = _config_crc32(config, seal["tensors"])
    if found != seal.get("config"):
        raise ValueError(
            f"The fields of config.json do not match their checksum ({found}, expected {seal.get('config')!r}): one "
            f"was changed, and the model would not compute what it did. {_DAMAGED}"
        )
    if kwargs.get("variant") is None:
        _check_tensors(_files_of(source, hub), seal["tensors"])


def _check_tensors(files: list[str], record: Mapping[str, Any]) -> None:
    left = dict(record)
    for key, tensor in _tensors(files):
        if key not in left:
            raise MaskFormatError(f"The model's file holds {key!r}, which config.json does not know. {_DAMAGED}")
        check_tensor(key, tensor, left.pop(key), _DAMAGED)
        check_no_nan(key, tensor, _DAMAGED)
    if left:
        raise MaskFormatError(f"The model's file holds no {next(iter(left))!r} ({len(left)} such tensors). {_DAMAGED}")


def _files_of(source: Any, hub: Optional[Mapping[str, Any]] = None) -> list[str]:
    """The safetensors file of a model, or its shards."""

    def find(name: str) -> Optional[str]:
        return cached_file(source, name, _raise_exceptions_for_missing_entries=False, **(hub or {}))

    single = find(SAFE_WEIGHTS_NAME)
    if single is not None:
        return [single]
    index = find(SAFE_WEIGHTS_INDEX_NAME)
    if index is None:
        return []
    names = sorted(set(json.loads(Path(index).read_text(encoding="utf-8"))["weight_map"].values()))
    shards = [(name, find(name)) for name in names]
    if missing := [name for name, found in shards if found is None]:
        raise MaskFormatError(f"{source} holds no {missing[0]!r}. {_DAMAGED}")
    return [found for _, found in shards if found is not None]


def _tensors(files: Iterable[str]) -> Iterator[tuple[str, torch.Tensor]]:
    for path in files:
        try:
            with safe_open(path, framework="pt") as file:
                for key in file.keys():
                    yield key, file.get_tensor(key)
        except SafetensorError as error:
            raise MaskFormatError(f"{path} cannot be read: {error}. {_DAMAGED}") from error
