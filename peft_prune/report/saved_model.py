"""Exports of whole models that were saved: compact, sparse, or ordinary ones, perhaps fine-tuned further."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Optional

from transformers import AutoConfig
from transformers.utils import cached_file

from ..structure.compact import load_compact, resolve_class
from ..structure.record import FIELD
from ..structure.shrink import shrink
from ..structure.sparse_checkpoint import SPARSE, load_sparse
from .export import check_installed, check_output, check_smaller, write_model


def holds_model(source: str) -> bool:
    """Whether a folder or Hub id holds a whole model, and no adapter.

    Raises:
        ValueError: it is a path, and nothing is there.
    """
    if Path(source).is_absolute() and not Path(source).exists():
        raise ValueError(f"{source!r} is not there. Name a folder that holds an adapter or a model, or a Hub id.")
    adapter, model = (
        cached_file(
            source,
            name,
            _raise_exceptions_for_missing_entries=False,
            _raise_exceptions_for_gated_repo=False,
            _raise_exceptions_for_connection_errors=False,
        )
        for name in ("adapter_config.json", "config.json")
    )
    return adapter is None and model is not None


def load_saved(source: str) -> Any:
    """Load a model by what its config says of it: with [`load_compact`], [`load_sparse`] or `from_pretrained`.

    Args:
        source (`str`): folder or Hub id.

    Raises:
        ValueError: its class is not known, or it is damaged.
    """
    config = AutoConfig.from_pretrained(source)
    if getattr(config, FIELD, None):
        return load_compact(source)
    if getattr(config, SPARSE, None):
        return load_sparse(source)
    return resolve_class(config, None).from_pretrained(source)


def export_saved(source: str, base: Optional[str], to: str, output: str) -> str:
    """Write a saved model in another form.

    Args:
        source (`str`): folder or Hub id of a whole model, with the tokenizer if there is one.
        base (`str`, *optional*): has to be left out.
        to (`str`): see [`export`]; `"dense"` unpacks what [`save_sparse`] wrote, and `"compact"` takes out heads and
            neurons that contribute nothing.
        output (`str`): folder to write.

    Returns:
        `str`: what was written.

    Raises:
        ValueError: the model has no such form.
        ImportError: a package that the export needs is not installed.
    """
    if base is not None:
        raise ValueError(f"--base {base} is for adapters, and {source} holds a whole model. Leave it out.")
    check_output(output, [source])
    check_installed(to)
    if to == "dense" and not getattr(AutoConfig.from_pretrained(source), SPARSE, None):
        raise ValueError(
            f"{source} holds no adapter and no model of save_sparse, so there is nothing to unpack for --to dense. "
            "Name --to transformers, gguf, onnx or compact."
        )
    model = load_saved(source)
    if to == "compact":
        model = shrink(model)
        check_smaller(model, "Prune it first with a method that removes them, such as StructuredPruningConfig.")
    return write_model(model, to, output, [source])
