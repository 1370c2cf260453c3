"""Batches of calibration data: what of them goes into the model, and which tokens are no padding."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping
from typing import Any, Optional

import torch
from torch import nn

from ..peft_api import base_of
from .checks import check_text


def model_inputs(model: nn.Module, batch: Any, device: torch.device) -> dict[str, torch.Tensor]:
    """The tensors of a batch that the model takes, without labels unless decoder inputs are made of them."""
    if not isinstance(batch, Mapping):
        raise ValueError(
            f"calibrate needs batches that are mappings, such as {{'input_ids': ..., 'attention_mask': ...}}, but the "
            f"batches gave a {type(batch).__name__}. Use a collate_fn, for instance DataCollatorWithPadding."
        )
    base: Any = base_of(model)
    parameters = inspect.signature(base.forward).parameters
    anything = any(p.kind is p.VAR_KEYWORD for p in parameters.values()) and len(parameters) <= 2
    config = getattr(base, "config", None)
    needs_labels = getattr(config, "is_encoder_decoder", False) and "decoder_input_ids" not in batch
    inputs = {
        name: value.to(device)
        for name, value in batch.items()
        if isinstance(value, torch.Tensor) and (anything or name in parameters) and (name != "labels" or needs_labels)
    }
    if not inputs:
        raise ValueError(
            f"calibrate: none of the batch's entries {list(batch)} is a tensor that the model accepts. Tokenize "
            "first, and return tensors."
        )
    check_text(base, inputs)
    return inputs


def first_examples(batches: Iterable[Any], num_samples: int) -> list[Any]:
    """Batches until there are enough examples, kept for several walks. What is no batch ends it, and is found there."""
    kept, seen = [], 0
    for batch in batches:
        kept.append(batch)
        tensors = [v for v in batch.values() if isinstance(v, torch.Tensor)] if isinstance(batch, Mapping) else []
        seen += len(tensors[0]) if tensors else num_samples
        if seen >= num_samples:
            break
    return kept


def _ids_and_pads(model: nn.Module, ids: torch.Tensor) -> torch.Tensor:
    pad = getattr(getattr(model, "config", None), "pad_token_id", None)
    return torch.ones_like(ids, dtype=torch.bool) if pad is None else ids != pad


def real_tokens(model: nn.Module, inputs: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """Which tokens are no padding: bool, shape (batch, tokens)."""
    mask = inputs.get("attention_mask")
    if mask is not None and mask.dim() == 2:
        return mask.bool()
    if "input_ids" in inputs:
        return _ids_and_pads(model, inputs["input_ids"])
    if "inputs_embeds" in inputs:
        return torch.ones(inputs["inputs_embeds"].shape[:2], dtype=torch.bool)
    return _image_tokens(model, inputs)


def _image_tokens(model: nn.Module, inputs: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """Patches of images and the class token, all of them real."""
    pixels = inputs.get("pixel_values")
    size = getattr(getattr(model, "config", None), "patch_size", None)
    if pixels is None or not isinstance(size, int):
        raise ValueError(
            f"calibrate cannot tell how many tokens a batch of {list(inputs)} has. Batches need input_ids, "
            "inputs_embeds or pixel_values."
        )
    patches = (pixels.shape[-2] // size) * (pixels.shape[-1] // size)
    return torch.ones(len(pixels), patches + 1, dtype=torch.bool)


def decoder_tokens(model: nn.Module, inputs: Mapping[str, torch.Tensor]) -> Optional[torch.Tensor]:
    if "decoder_attention_mask" in inputs:
        return inputs["decoder_attention_mask"].bool()
    if "decoder_input_ids" in inputs:
        counts = _ids_and_pads(model, inputs["decoder_input_ids"])
        counts[:, 0] = True  # T5 starts with what it pads with
        return counts
    if "labels" in inputs and inputs["labels"].dim() == 2:
        return inputs["labels"] != -100
    return None
