"""What is wrong with calibration data, before any work is done with it."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any, Optional

import torch
from torch import nn


NO_TOKENS = "calibrate: the examples contain padding only. Check attention_mask and pad token."


def check_text(model: nn.Module, inputs: Mapping[str, torch.Tensor]) -> None:
    """Raise `ValueError` if a batch's text does not fit the model.

    Args:
        model (`nn.Module`): the model.
        inputs (`Mapping[str, torch.Tensor]`): its arguments; images and embeddings are not looked at.
    """
    for key, mask in (("input_ids", "attention_mask"), ("decoder_input_ids", "decoder_attention_mask")):
        if key in inputs:
            _check_ids(model, key, inputs[key])
            # packed texts without padding follow each other in one row, and each counts its positions from 0
            packed = inputs.get("position_ids") if key == "input_ids" else None
            _check_length(model, key, inputs[key].shape[1] if packed is None else int(packed.max()) + 1)
            if mask in inputs and inputs[mask].dim() == 2 and inputs[mask].shape != inputs[key].shape:
                raise ValueError(
                    f"calibrate: a batch has {mask} of shape {tuple(inputs[mask].shape)} for {key} of shape "
                    f"{tuple(inputs[key].shape)}. Take both from the same call of the tokenizer."
                )


def _check_ids(model: nn.Module, key: str, ids: torch.Tensor) -> None:
    if ids.dim() != 2 or not ids.shape[1]:
        raise ValueError(
            f"calibrate: a batch has {key} of shape {tuple(ids.shape)}. Texts have the shape (batch, tokens), with "
            "at least one token; make a single text a batch of one: input_ids.unsqueeze(0)."
        )
    if ids.is_floating_point():
        raise ValueError(
            f"calibrate: a batch has {key} of dtype {ids.dtype}. Tokens are integers, as a tokenizer returns them: "
            f"{key}.long()."
        )
    embeddings = getattr(model, "get_input_embeddings", lambda: None)()
    known = getattr(embeddings, "num_embeddings", None)
    if not isinstance(known, int) or not ids.numel():
        return
    wrong = ids[(ids < 0) | (ids >= known)]
    if len(wrong):
        raise ValueError(
            f"calibrate: a batch has the token {int(wrong[0])} in {key}, but the model knows the tokens 0 to "
            f"{known - 1}. Use the tokenizer of the base model."
        )


def _check_length(model: nn.Module, key: str, length: int) -> None:
    longest = longest_text(model)
    if longest is not None and length > longest:
        raise ValueError(
            f"calibrate: a batch has {length:,} tokens in {key}, but the model accepts at most {longest:,} "
            f"(max_position_embeddings). Truncate the texts: tokenizer(..., truncation=True, max_length={longest})."
        )


def longest_text(model: nn.Module) -> Optional[int]:
    """Tokens of the longest text that a model is made for; `None` if it does not say."""
    config: Any = getattr(model, "config", None)
    longest = getattr(config, "max_position_embeddings", None)
    if longest is None and hasattr(config, "get_text_config"):
        longest = getattr(config.get_text_config(), "max_position_embeddings", None)
    for name, module in model.named_modules():
        # RoBERTa and its kin count positions from behind the padding token
        if isinstance(module, nn.Embedding) and name.endswith("position_embeddings") and module.padding_idx is not None:
            longest = module.num_embeddings - module.padding_idx - 1
    return longest if isinstance(longest, int) and longest > 0 else None


def check_counts(counts: Sequence[Sequence[Optional[torch.Tensor]]]) -> None:
    """Raise `ValueError` if all tokens of encoder or decoder are padding.

    Args:
        counts: by batch and side, which tokens are no padding: bool, shape (batch, tokens).
    """
    for side in zip(*counts, strict=True):
        known = [real for real in side if real is not None]
        if known and not any(bool(real.any()) for real in known):
            raise ValueError(NO_TOKENS)


def warn_of_few_examples(found: int, asked: int) -> None:
    """Warn if batches gave fewer examples than the config asks for."""
    if found < asked:
        warnings.warn(
            f"calibrate: batches gave {found:,} example{'s' * (found != 1)}, fewer than num_samples={asked:,}. All "
            f"were used. Pass more, or set num_samples={found} in the config.",
            UserWarning,
            stacklevel=2,
        )


def check_device(device: Any) -> None:
    """Raise `ValueError` if a device is not there."""
    try:
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, TypeError) as error:
        reason = str(error).split("\n")[0].rstrip(".")
        raise ValueError(f"calibrate: device={device!r} cannot be used: {reason}.") from error
