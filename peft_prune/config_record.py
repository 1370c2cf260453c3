"""What `adapter_config.json` records: checksums of the tensors beside the masks, and of its own fields."""

from __future__ import annotations

import json
import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, Optional

import torch
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from safetensors import SafetensorError, safe_open

from .storage.checksums import check_no_nan, check_tensor, describe_tensor, is_tensor_record
from .storage.codec import MaskFormatError


PREFIX = "base_model.model."  # PEFT writes keys with it, Transformers adds it
DAMAGED = (
    "The adapter is damaged, or was altered. Download or save it again. If you changed it on purpose, set "
    '"check_tensors": false in adapter_config.json.'
)
# fields that may differ from what was saved: where the base model is, versions, and how to load
_FREE = frozenset(
    {
        "auto_mapping", "base_model_name_or_path", "check_base", "check_tensors", "checksums", "inference_mode",
        "peft_version", "revision",
    }
)  # fmt: skip


class Verified(dict):
    """Checksums whose config has been compared with them; it may be changed in Python from here on."""


def covered_fields(config: Any) -> list[str]:
    """Names of the fields that the checksum of a config covers."""
    return sorted(field.name for field in fields(config) if field.name not in _FREE)


def config_crc32(config: Any, tensors: Mapping[str, Any], names: Sequence[str]) -> str:
    """CRC-32 of fields of a config, and of the records of tensors.

    Args:
        config ([`PruningConfig`]): the configuration.
        tensors (`Mapping`): records of tensors by key.
        names (`Sequence[str]`): the fields. A file names those that it was saved with, so that fields which a later
            version adds, or defaults which it changes, do not count.

    Returns:
        `str`: 8 hexadecimal digits.
    """
    values = config.to_dict()
    covered = {name: _plain(values.get(name)) for name in names}
    text = json.dumps([covered, dict(tensors)], sort_keys=True, default=str)
    return f"{zlib.crc32(text.encode()):08x}"


def _are_names(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(name, str) for name in value)


def _plain(value: Any) -> Any:
    """A value as JSON has it; lists of names, which are sets to PEFT, in one order."""
    if isinstance(value, (set, tuple)):
        value = list(value)
    return sorted(value) if isinstance(value, list) and all(isinstance(item, str) for item in value) else value


def check_config(config: Any) -> None:
    """Compare a config that was read from a file with its checksum, once.

    Raises:
        ValueError: a field was changed in the file.
    """
    record = config.checksums
    if record is None or isinstance(record, Verified):
        return
    if not isinstance(record, dict) or not (
        is_tensor_record(record.get("tensors")) and _are_names(record.get("fields"))
    ):
        raise ValueError(f"checksums={record!r:.80} must be a dict with 'config', 'fields', 'tensors'. {DAMAGED}")
    names, tensors = record["fields"], record["tensors"]
    known = set(covered_fields(config)).issuperset(names)  # otherwise a version that had more of them wrote it
    found = config_crc32(config, tensors, names) if known else record.get("config")
    if config.check_tensors and record.get("config") != found:
        raise ValueError(
            f"The fields of adapter_config.json do not match their checksum ({found}, expected "
            f"{record.get('config')!r}): a field was changed, so the model would compute something else. {DAMAGED}"
        )
    config.checksums = Verified(record) if record["tensors"] else None


# ------------------------------------------------------------------------- saving


def has_own_record(config: Any, key: str) -> bool:
    """Whether a tensor, by its key in the file, is a final mask or kept values, which `mask_info` records."""
    if not config.finalized:
        return False
    method = str(config.peft_type.value).lower()
    for kind in ("mask", "values"):
        suffix = f".{method}_{kind}"
        if key.endswith(suffix):
            info = (config.mask_info or {}).get(key.removeprefix(PREFIX).removesuffix(suffix), {})
            return kind == "mask" and bool(info) or kind in info
    return False


def describe_tensors(config: Any, tensors: Iterable[tuple[str, torch.Tensor]]) -> dict[str, dict[str, Any]]:
    """Records of the tensors that `mask_info` has none of, by key without PEFT's prefix."""
    return {key.removeprefix(PREFIX): describe_tensor(t) for key, t in tensors if not has_own_record(config, key)}


def checksums_for(config: Any, folder: Path) -> Optional[dict[str, Any]]:
    """What is recorded when a config is saved: of the adapter file that is there, or of the one that is to come.

    Nothing, if a config is saved by itself.

    PEFT writes the file before the config, Transformers after it. What the tuner has just handed out
    (`config.tensors_when_saved`) tells whether the file is the one that belongs to the config.
    """
    handed_out: Optional[dict[str, Any]] = config.tensors_when_saved
    path = folder / SAFETENSORS_WEIGHTS_NAME
    if handed_out is None and not path.is_file():
        return None
    tensors = handed_out or {}
    if handed_out is None or handed_out:
        found = _of_file(config, path) if path.is_file() else None
        if found is not None and all(found.get(key) == info for key, info in tensors.items()):
            tensors = found
    names = covered_fields(config)
    return {"config": config_crc32(config, tensors, names), "fields": names, "tensors": tensors}


def _of_file(config: Any, path: Path) -> Optional[dict[str, Any]]:
    try:
        with safe_open(str(path), framework="pt") as file:
            return describe_tensors(config, ((key, file.get_tensor(key)) for key in file.keys()))
    except (SafetensorError, OSError):
        return None


# ------------------------------------------------------------------------ loading


def check_tensors(config: Any, tensors: Mapping[str, torch.Tensor]) -> None:
    """Compare the tensors of an adapter file with their records; a file of an older version has none.

    Args:
        config ([`PruningConfig`]): the configuration that was read with it.
        tensors (`Mapping`): tensors by their key in the file.

    Raises:
        MaskFormatError: a tensor is missing, superfluous, of another shape or dtype, or changed, or holds NaN.
    """
    if not config.check_tensors:
        return
    others = {key.removeprefix(PREFIX): t for key, t in tensors.items() if not has_own_record(config, key)}
    record = (config.checksums or {}).get("tensors")
    if record:
        missing, extra = sorted(record.keys() - others.keys()), sorted(others.keys() - record.keys())
        if missing:
            raise MaskFormatError(f"The adapter file holds no {missing[0]!r} ({len(missing)} such tensors). {DAMAGED}")
        if extra:
            raise MaskFormatError(
                f"The adapter file holds {extra[0]!r} ({len(extra)} such tensors), which adapter_config.json does not "
                f"know. {DAMAGED}"
            )
        for key, info in record.items():
            check_tensor(key, others[key], info, DAMAGED)
    for key, tensor in others.items():
        check_no_nan(key, tensor, "It was saved after training diverged, or is damaged. " + DAMAGED)
