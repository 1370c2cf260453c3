"""An adapter and its base model as one model."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any, Optional, cast

import torch
import transformers
from peft import PeftModel

from .adapter_file import AdapterFile


_CLASSES = {
    "SEQ_CLS": "AutoModelForSequenceClassification",
    "TOKEN_CLS": "AutoModelForTokenClassification",
    "QUESTION_ANS": "AutoModelForQuestionAnswering",
    "CAUSAL_LM": "AutoModelForCausalLM",
    "SEQ_2_SEQ_LM": "AutoModelForSeq2SeqLM",
    "FEATURE_EXTRACTION": "AutoModel",
}


def load_with_base(adapter: AdapterFile, base: Optional[str] = None) -> PeftModel:
    """Load the base model that an adapter was made for, and the adapter on it.

    Args:
        adapter ([`AdapterFile`]): the adapter.
        base (`str`, *optional*): folder or Hub id of the base model, by default the one that the config names.

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
        module = importlib.import_module(config.auto_mapping["parent_library"])
        model_class = getattr(module, config.auto_mapping["base_model_class"])
    else:
        raise ValueError("The adapter's config has neither task_type nor auto_mapping, so its model class is unknown.")
    labels = _number_of_labels(adapter)
    kwargs = {"num_labels": labels} if labels else {}
    return PeftModel.from_pretrained(model_class.from_pretrained(source, **kwargs), adapter.source)


def _number_of_labels(adapter: AdapterFile) -> Optional[int]:
    """By the stored classifier: a base model without a head of its own does not know."""
    for key, tensor in adapter.others.items():
        if key.endswith(("classifier.weight", "classifier.out_proj.weight", "score.weight")):
            return int(tensor.shape[0])
    return None


def export(adapter: AdapterFile, base: Optional[str], to: str, output: str) -> str:
    """Write the masked model.

    Args:
        adapter ([`AdapterFile`]): the adapter.
        base (`str`, *optional*): folder or Hub id of the base model, by default the one that the config names.
        to (`str`): `"dense"`, a Transformers model with zeros in it, or `"onnx"`.
        output (`str`): folder to write.

    Returns:
        `str`: what was written.
    """
    if adapter.config.verbalizer:
        raise ValueError("This adapter has a verbalizer head, which is not part of the model that export writes.")
    model = cast(Any, load_with_base(adapter, base)).merge_and_unload(safe_merge=True).eval()
    Path(output).mkdir(parents=True, exist_ok=True)
    if to == "dense":
        model.save_pretrained(output)
        return output
    return _export_onnx(model, Path(output) / "model.onnx")


def _export_onnx(model: Any, path: Path) -> str:
    model.config.return_dict = False
    if hasattr(model.config, "use_cache"):
        model.config.use_cache = False
    ids = torch.ones(2, 8, dtype=torch.long)
    dynamic = {0: "batch", 1: "tokens"}
    torch.onnx.export(
        model,
        (),
        str(path),
        kwargs={"input_ids": ids, "attention_mask": torch.ones_like(ids)},
        input_names=["input_ids", "attention_mask"],
        output_names=["logits"],
        dynamic_axes={"input_ids": dynamic, "attention_mask": dynamic},
        dynamo=False,
    )
    return str(path)
