"""An adapter and its base model as one model."""

from __future__ import annotations

import importlib.util
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Optional, cast

import transformers
from peft import PeftModel

from ..structure.record import FIELD
from ..structure.standard import save_standard
from .adapter_file import AdapterFile
from .gguf import save_gguf
from .onnx_file import can_cache, export_onnx


_CLASSES = {
    "SEQ_CLS": "AutoModelForSequenceClassification",
    "TOKEN_CLS": "AutoModelForTokenClassification",
    "QUESTION_ANS": "AutoModelForQuestionAnswering",
    "CAUSAL_LM": "AutoModelForCausalLM",
    "SEQ_2_SEQ_LM": "AutoModelForSeq2SeqLM",
    "FEATURE_EXTRACTION": "AutoModel",
}
_TRANSFORMERS = logging.getLogger("transformers.modeling_utils")
# where architectures have the matrix that makes the logits of classes
_HEADS = ("classifier.weight", "classifier.out_proj.weight", "classification_head.out_proj.weight", "score.weight")


def load_with_base(adapter: AdapterFile, base: Optional[str] = None) -> tuple[PeftModel, list[str]]:
    """Load the base model that an adapter was made for, and the adapter on it.

    Args:
        adapter ([`AdapterFile`]): the adapter.
        base (`str`, *optional*): folder or Hub id of the base model, by default the one that the config names.

    Returns:
        `tuple[PeftModel, list[str]]`: the model, and names of parameters that are stored nowhere and so are random.

    Raises:
        ValueError: the base model, or its class, is not known.
        MaskFormatError: it is another one than the masks were made for.
    """
    config = adapter.config
    source = base or config.base_model_name_or_path
    if not source:
        raise ValueError("The adapter does not name its base model. Give it with --base.")
    if config.task_type in _CLASSES:
        model_class = getattr(transformers, _CLASSES[config.task_type])  # type: ignore[index]
    elif config.auto_mapping:  # as PEFT's AutoPeftModel does
        model_class = _mapped_class(config.auto_mapping)
    else:
        raise ValueError("The adapter's config has neither task_type nor auto_mapping, so its model class is unknown.")
    labels = _number_of_labels(adapter)
    # a head of the base's own, with another number of labels, makes room for the one that the adapter holds
    kwargs = {"num_labels": labels, "ignore_mismatched_sizes": True} if labels else {}
    with _loading_report_held_back() as held_back:
        model, loading = model_class.from_pretrained(source, output_loading_info=True, **kwargs)
        random = _not_stored(loading, adapter)
        if not random:
            held_back.clear()
    return PeftModel.from_pretrained(model, adapter.source), random


@contextmanager
def _loading_report_held_back() -> Iterator[list[logging.LogRecord]]:
    """Hold back Transformers' report on what a checkpoint lacks; what is left in the list is logged at the end.

    It calls a classifier missing which the adapter is about to bring.
    """
    held_back: list[logging.LogRecord] = []

    def passes(record: logging.LogRecord) -> bool:
        is_report = "LOAD REPORT" in record.getMessage()
        if is_report:
            held_back.append(record)
        return not is_report

    _TRANSFORMERS.addFilter(passes)
    try:
        yield held_back
    finally:
        _TRANSFORMERS.removeFilter(passes)
        for record in held_back:
            _TRANSFORMERS.handle(record)


def _mapped_class(mapping: Any) -> Any:
    """Class that `auto_mapping` names. A stranger's config must not import whatever is installed.

    Raises:
        ValueError: it is no model class of Transformers.
    """
    names = [mapping.get(key) if isinstance(mapping, dict) else None for key in ("parent_library", "base_model_class")]
    module, name = (part if isinstance(part, str) else "" for part in names)
    # what Transformers offers by itself: nothing is imported by a name from the file
    found = getattr(transformers, name, None) if module.partition(".")[0] == "transformers" else None
    if not (isinstance(found, type) and issubclass(found, transformers.PreTrainedModel)):
        raise ValueError(
            f"auto_mapping={mapping!r:.200} names no model class of Transformers. Load the model in Python: "
            "PeftModel.from_pretrained(base_model, ...)."
        )
    return found


def _not_stored(loading: dict[str, Any], adapter: AdapterFile) -> list[str]:
    """Parameters that neither base nor adapter has, so that chance has filled them."""
    new = {*loading["missing_keys"], *(key for key, *_ in loading["mismatched_keys"])}
    stored = {key.removeprefix("base_model.model.") for key in adapter.others} | {
        f"{name}.weight" for name in adapter.values
    }
    return sorted(key for key in new if key not in stored)


def _number_of_labels(adapter: AdapterFile) -> Optional[int]:
    """By the stored classifier: a base model without a head of its own does not know."""
    for key, tensor in adapter.others.items():
        if key.endswith(_HEADS):
            return int(tensor.shape[0])
    return None


def export(adapter: AdapterFile, base: Optional[str], to: str, output: str) -> str:
    """Write the masked model.

    Args:
        adapter ([`AdapterFile`]): the adapter.
        base (`str`, *optional*): folder or Hub id of the base model, by default the one that the config names.
        to (`str`): `"dense"`, a Transformers model with zeros in it, `"compact"`, one without the heads and neurons
            that are gone, for [`load_compact`], `"transformers"`, the same as an ordinary checkpoint with a tokenizer,
            see [`save_standard`], `"gguf"`, llama.cpp's form, see [`save_gguf`], or `"onnx"`, onnxruntime's, see
            [`export_onnx`].
        output (`str`): folder to write.

    Returns:
        `str`: what was written.

    Raises:
        ValueError: `output` is the base model's or the adapter's folder, the model is not whole, such as without a
            trained head, or cannot be made smaller.
        ImportError: a package that the export needs is not installed.
    """
    check_output(output, [base, adapter.config.base_model_name_or_path, adapter.source])
    check_installed(to)
    if adapter.config.verbalizer:
        raise ValueError("This adapter has a verbalizer head, which is not part of the model that export writes.")
    # ONNX and GGUF files need no anatomy: the model is made smaller if the method removes units, and not otherwise
    shrink = {"dense": False, "compact": True, "transformers": True}.get(to)
    loaded, random = load_with_base(adapter, base)
    if random:
        raise ValueError(
            f"Neither the base model nor the adapter stores {', '.join(map(repr, random))}, so the export would hold "
            "random numbers there. Train with task_type='SEQ_CLS' (or that of your task), which saves the classifier, "
            "or name these modules in modules_to_save, so that the adapter holds them."
        )
    model = cast(Any, loaded).merge_and_unload(safe_merge=True, shrink=shrink)
    if to in ("compact", "transformers"):
        check_smaller(model, "Use --to dense.")
    return write_model(model, to, output, [adapter.source, base or adapter.config.base_model_name_or_path])


def check_installed(to: str) -> None:
    """Raise `ImportError` before any work if a package that an export needs is not installed."""
    if to in ("onnx", "gguf") and importlib.util.find_spec(to) is None:
        raise ImportError(f"--to {to} needs the package {to}, which is not installed: pip install 'peft_prune[{to}]'")


def check_smaller(model: Any, instead: str) -> None:
    """Raise `ValueError` if nothing was removed from a model, and say what to do instead."""
    if not getattr(model.config, FIELD, None):
        raise ValueError(
            f"No head and no neuron of this model is without weights, so it cannot be made smaller. {instead}"
        )


def write_model(model: Any, to: str, output: str, tokenizers: list[Optional[str]]) -> str:
    """Write a model without adapters in one of the forms of [`export`], with its tokenizer.

    Args:
        model (`PreTrainedModel`): the model.
        to (`str`): see [`export`]; of a causal language model ONNX files have a cache of keys and values.
        output (`str`): folder to write, made if it is not there.
        tokenizers (`list[str]`): folders or Hub ids that may hold the model's tokenizer; the first that does counts.

    Returns:
        `str`: what was written.
    """
    model, place = model.eval(), Path(output)
    tokenizer, written = _tokenizer(tokenizers), output
    if to == "transformers":
        save_standard(model, output, tokenizer)
        return output
    if to == "gguf":  # which has the tokenizer in it
        return str(save_gguf(model, place / "model.gguf", tokenizer))
    if to == "onnx":
        written = export_onnx(model, place / "model.onnx", use_cache=can_cache(model))
    else:
        model.save_pretrained(output)
    if tokenizer is not None:
        tokenizer.save_pretrained(output)
    return written


def _tokenizer(sources: list[Optional[str]]) -> Any:
    """The tokenizer that lies beside an adapter, or else beside its base model; `None` if there is none."""
    for source in filter(None, sources):
        try:
            return transformers.AutoTokenizer.from_pretrained(source, trust_remote_code=False)
        except Exception:  # whatever is wrong with a tokenizer, the model is written
            continue
    return None


def check_output(output: str, sources: list[Optional[str]]) -> None:
    """As [`check_folder`], for a model: it cannot be put beside an adapter."""
    check_folder(output, sources)
    if (Path(output) / "adapter_config.json").exists():
        raise ValueError(
            f"output={output!r} holds an adapter, which Transformers would load on top of the model. Name another "
            "folder."
        )


def check_folder(output: str, sources: list[Optional[str]]) -> None:
    """Raise `ValueError` if a folder cannot be written without harm to a model or adapter that is read.

    Args:
        output (`str`): folder to write; it need not exist.
        sources (`list[str]`): folders that are read, under any name; Hub ids are left out.
    """
    target = Path(os.path.realpath(output))
    if target.exists() and not target.is_dir():
        raise ValueError(f"output={output!r} is a file. Name a folder.")
    files = {(s.st_dev, s.st_ino): path for path in target.glob("*") if path.is_file() and (s := path.stat())}
    for source in filter(None, sources):
        folder = Path(source)
        if not folder.is_dir():
            continue
        if target.is_dir() and target.samefile(folder):
            raise ValueError(
                f"output={output!r} is the folder of {source!r}, which would be lost. Name another folder."
            )
        for path in folder.glob("*"):
            link = files.get((path.stat().st_dev, path.stat().st_ino)) if path.is_file() else None
            if link is not None:
                raise ValueError(
                    f"output={output!r} holds {link.name!r}, a link to {str(path)!r}, which would be lost. Name "
                    "another folder."
                )
