"""Where the tensors of a sparse model come from: a model in memory, or files that are read one tensor at a time."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Optional

import torch
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, HFValidationError, RepositoryNotFoundError
from safetensors import safe_open
from torch import nn
from transformers.utils.import_utils import check_torch_load_is_safe

from ..peft_api import BaseTunerLayer
from .mask_file import MaskFile


DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
_IN_FILES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
# in the order in which Transformers looks for them; then MaskLLM's name of its masks, and the shorter one
_INDEX = ".index.json"
_WEIGHTS = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")
_MASKS = ("mask_compressed.npz", "mask.npz")


class Weights:
    """Tensors of a sparse model by name.

    Attributes:
        label (`str`): what was given, for messages.
        nbytes (`int`): bytes of all tensors, or of the files.
        architecture (`str`, *optional*): name of the model class that its config names.
    """

    label: str
    nbytes: int
    architecture: Optional[str] = None

    def names(self) -> Iterable[str]:
        """Names of all tensors."""
        raise NotImplementedError

    def dtype(self, name: str) -> Optional[torch.dtype]:
        """Dtype of a tensor, without reading it; `None` if it is none of float64, float32, float16, bfloat16."""
        raise NotImplementedError

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor, without reading it."""
        raise NotImplementedError

    def get(self, name: str) -> torch.Tensor:
        """A tensor, on the CPU or where the model is."""
        raise NotImplementedError


class ModelWeights(Weights):
    """Tensors of a model in memory."""

    def __init__(self, model: nn.Module) -> None:
        if any(isinstance(module, BaseTunerLayer) for module in model.modules()):
            raise ValueError(
                "sparse_model holds adapters, so its weights are not what it computes with. Merge them first: "
                "sparse_model.merge_and_unload()."
            )
        self._tensors = {name: t.detach() for name, t in model.state_dict().items() if isinstance(t, torch.Tensor)}
        self.label = type(model).__name__
        self.nbytes = sum({t.data_ptr(): t.nbytes for t in self._tensors.values()}.values())
        self.architecture = type(model).__name__

    def names(self) -> Iterable[str]:
        return self._tensors

    def dtype(self, name: str) -> Optional[torch.dtype]:
        return self._tensors[name].dtype if self._tensors[name].dtype in DTYPES else None

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._tensors[name].shape)

    def get(self, name: str) -> torch.Tensor:
        tensor = self._tensors[name]
        if tensor.is_meta:
            raise ValueError(f"sparse_model: {name!r} is not loaded (device 'meta'). Load it without offloading.")
        return tensor


class FileWeights(Weights):
    """Tensors of safetensors files, or of PyTorch's, which are mapped into memory and unpickle tensors only."""

    def __init__(self, label: str, files: list[Path], architecture: Optional[str] = None) -> None:
        self.label, self.architecture = label, architecture
        self.nbytes = sum(path.stat().st_size for path in files)
        self._where: dict[str, tuple[Any, str]] = {}
        for path in files:
            held: Any = _mapped(path) if path.suffix in (".bin", ".pt") else safe_open(str(path), framework="pt")
            for key in held.keys():
                # as Transformers renames them: checkpoints that come from TensorFlow
                name = key.replace("LayerNorm.gamma", "LayerNorm.weight").replace("LayerNorm.beta", "LayerNorm.bias")
                if name in self._where:
                    raise ValueError(f"{label}: two files hold the tensor {name!r}. Download it again.")
                self._where[name] = (held, key)

    def names(self) -> Iterable[str]:
        return self._where

    def dtype(self, name: str) -> Optional[torch.dtype]:
        held, key = self._where[name]
        if isinstance(held, dict):
            return held[key].dtype if held[key].dtype in DTYPES else None
        return _IN_FILES.get(held.get_slice(key).get_dtype())

    def shape(self, name: str) -> tuple[int, ...]:
        held, key = self._where[name]
        return tuple(held[key].shape if isinstance(held, dict) else held.get_slice(key).get_shape())

    def get(self, name: str) -> torch.Tensor:
        held, key = self._where[name]
        return held[key] if isinstance(held, dict) else held.get_tensor(key)


def _mapped(path: Path) -> dict[str, torch.Tensor]:
    check_torch_load_is_safe()
    found = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    if not isinstance(found, dict) or not all(isinstance(value, torch.Tensor) for value in found.values()):
        raise ValueError(f"{path.name} is not a checkpoint: it must hold tensors by name, and nothing else.")
    return found


def open_source(sparse_model: Any) -> Weights | MaskFile:
    """What a sparse model is read from.

    Args:
        sparse_model: a model; a file (`.safetensors`, `.bin`, or a mask file, `.npz`); a folder, or the Hub id of a
            model or mask file.

    Raises:
        ValueError: there is nothing of the kind.
        TypeError: it is neither a model nor a path.
    """
    if isinstance(sparse_model, nn.Module):
        return ModelWeights(sparse_model)
    if not isinstance(sparse_model, (str, os.PathLike)):
        raise TypeError(f"sparse_model must be a model, a path or a Hub id, not {type(sparse_model).__name__}.")
    source = os.fspath(sparse_model)
    if Path(source).is_file():
        return _of_files(source, [Path(source)])
    for name in (*_WEIGHTS, *_MASKS):
        path = find_file(source, name)
        if path is not None:
            files = _shards(source, path) if name.endswith(_INDEX) else [path]
            return _of_files(source, files, _architecture(source))
    raise ValueError(
        f"sparse_model={source!r} holds no weights and no masks: none of {', '.join(_WEIGHTS + _MASKS)}. Without a "
        "network, only files that were downloaded before are found for a Hub id."
    )


def find_file(source: str, name: str) -> Optional[Path]:
    """A file of a folder or of a repository on the Hub, `None` if it has none of that name.

    Raises:
        ValueError: there is no such folder or repository.
    """
    if Path(source).is_dir():
        return Path(source) / name if (Path(source) / name).is_file() else None
    try:
        return Path(hf_hub_download(source, name))
    except EntryNotFoundError:  # or it is not in the cache, without a network
        return None
    except (HFValidationError, RepositoryNotFoundError) as error:
        raise ValueError(
            f"{source!r} is neither a file or folder here nor a model on the Hub that you can read."
        ) from error


def _of_files(label: str, files: list[Path], architecture: Optional[str] = None) -> Weights | MaskFile:
    kinds = {path.suffix for path in files}
    if kinds == {".npz"}:
        return MaskFile(label, files[0])
    if not kinds <= {".safetensors"} and not kinds <= {".bin", ".pt"}:
        raise ValueError(
            f"sparse_model={label!r}: files of kind {', '.join(sorted(kinds))!r} cannot be read. Use safetensors, "
            ".bin, or a mask file (.npz)."
        )
    return FileWeights(label, files, architecture)


def _shards(source: str, index: Path) -> list[Path]:
    """Files that an index names; a stranger's index must not lead out of its folder."""
    found = json.loads(index.read_text(encoding="utf-8"))
    mapping = found.get("weight_map") if isinstance(found, dict) else None
    names = sorted(set(map(str, mapping.values()))) if isinstance(mapping, dict) else []
    if not names or any(not name or Path(name).name != name or "\\" in name for name in names):
        raise ValueError(f"{source}: {index.name} does not name the files of a checkpoint. Download it again.")
    paths = [(name, find_file(source, name)) for name in names]
    missing = [name for name, path in paths if path is None]
    if missing:
        raise ValueError(f"{source}: the file {missing[0]!r} is missing ({len(missing)} of {len(names)}).")
    return [path for _, path in paths if path is not None]


def _architecture(source: str) -> Optional[str]:
    path = find_file(source, "config.json")
    config = json.loads(path.read_text(encoding="utf-8")) if path else None
    names = config.get("architectures") if isinstance(config, dict) else None
    return names[0] if isinstance(names, list) and names and isinstance(names[0], str) else None
