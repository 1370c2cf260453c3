"""Models as ONNX files, for onnxruntime; causal language models also with a cache of keys and values."""

from __future__ import annotations

import inspect
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import DynamicCache, PreTrainedModel


def export_onnx(model: Any, path: str | os.PathLike, use_cache: bool = False) -> str:
    """Write a model as an ONNX file, for inputs of any batch and length.

    The file takes `input_ids` and `attention_mask`, of an encoder-decoder also `decoder_input_ids`, of an image model
    `pixel_values`. With `use_cache=True` it also takes `past_key_values.0.key`, `past_key_values.0.value`, ..., shape
    (batch, heads of keys and values, past, head width), and puts out `present.0.key`, ..., which are the past of the
    next step. `attention_mask` then covers past and new tokens. The first step has a past of length 0. Positions are
    counted from the mask, so that prompts may be padded on the left. Layers may differ in heads and neurons.

    Args:
        model (`PreTrainedModel`): dense or compact, fine-tuned or not. Its outputs keep their names, such as `logits`.
        path (`str` or `os.PathLike`): file to write; its folder is made if it is not there.
        use_cache (`bool`): whether a causal language model can generate token by token.

    Returns:
        `str`: the path.

    Raises:
        TypeError: `use_cache=True`, and the model is none of Transformers'.
        ValueError: `path` is a folder; or `use_cache=True`, and the model is no causal language model with keys and
            values in each layer.
    """
    if use_cache:
        _check_causal(model)
    if Path(path).is_dir():
        raise ValueError(f"path={str(path)!r} is a folder. Name a file, such as {str(Path(path) / 'model.onnx')!r}.")
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    inputs = _example(model)
    axes = {name: {0: "batch", 1: _LENGTHS[name]} if name in _LENGTHS else {0: "batch"} for name in inputs}
    with _in_use(model, use_cache), torch.no_grad():
        outputs = model(**inputs, **({"past_key_values": DynamicCache()} if use_cache else {}))
        names = [name for name, value in outputs.items() if isinstance(value, torch.Tensor)]
        if use_cache:
            past = _past(outputs.past_key_values)
            names += [name.replace("past_key_values", "present") for name in past]
            inputs |= past
            inputs["attention_mask"] = inputs["attention_mask"].repeat(1, 2)  # of the past, and of as many new tokens
            axes |= dict.fromkeys(past, {0: "batch", 2: "past"}) | {"attention_mask": {0: "batch", 1: "all tokens"}}
        traced = (_WithCache if use_cache else _Tensors)(model, list(inputs)).eval()
        torch.onnx.export(
            traced, tuple(inputs.values()), str(path), input_names=list(inputs), output_names=names,
            dynamic_axes=axes, dynamo=False,
        )  # fmt: skip
    return str(path)


_LENGTHS = {"input_ids": "tokens", "attention_mask": "tokens", "decoder_input_ids": "decoder tokens"}


class _Tensors(torch.nn.Module):
    """A model whose inputs and outputs are tensors one after the other, as an ONNX file has them."""

    def __init__(self, model: Any, names: list[str]) -> None:
        super().__init__()
        self.model, self.names = model, names

    def forward(self, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        outputs = self.model(**dict(zip(self.names, tensors, strict=True)))
        return tuple(value for value in outputs.values() if isinstance(value, torch.Tensor))


class _WithCache(_Tensors):
    """The same with keys and values of earlier tokens, as tensors."""

    def forward(self, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        ids, mask, *past = tensors
        cache = DynamicCache()  # without a config: all layers keep all tokens, and masks do the rest
        for layer in range(len(past) // 2):
            cache.update(past[2 * layer], past[2 * layer + 1], layer)
        more = {}
        if "position_ids" in inspect.signature(self.model.forward).parameters:  # as `generate` counts them
            positions = (mask.long().cumsum(1) - 1).clamp(min=0)
            more["position_ids"] = positions[:, -ids.shape[1] :]
        outputs = self.model(input_ids=ids, attention_mask=mask, past_key_values=cache, use_cache=True, **more)
        first = [value for value in outputs.values() if isinstance(value, torch.Tensor)]
        return (*first, *_past(outputs.past_key_values).values())


def _past(cache: Any) -> dict[str, torch.Tensor]:
    """Keys and values of each layer, by their names in an ONNX file."""
    past = {}
    for number, layer in enumerate(cache.layers):
        past[f"past_key_values.{number}.key"] = layer.keys
        past[f"past_key_values.{number}.value"] = layer.values
    return past


def _check_causal(model: Any) -> None:
    if not isinstance(model, PreTrainedModel):
        raise TypeError(
            f"export_onnx(use_cache=True) needs a Transformers model, not {type(model).__name__}. Of a PeftModel "
            "export what model.merge_and_unload() returns."
        )
    if not can_cache(model):
        raise ValueError(
            f"use_cache=True is for causal language models with keys and values in each layer, and "
            f"{type(model).__name__} is none. Use use_cache=False."
        )


def can_cache(model: Any) -> bool:
    """Whether a model is a causal language model that [`export_onnx`] can write with a cache."""
    return (
        isinstance(model, PreTrainedModel)
        and bool(model.can_generate())
        and not model.config.is_encoder_decoder
        and not getattr(model, "_is_stateful", False)  # state space models
        and "past_key_values" in inspect.signature(model.forward).parameters
    )


def _example(model: Any) -> dict[str, torch.Tensor]:
    """Inputs that a model is traced with."""
    config, first = model.config, next(model.parameters())
    if getattr(model, "main_input_name", "") == "pixel_values":
        size = config.image_size if isinstance(config.image_size, (list, tuple)) else [config.image_size] * 2
        return {"pixel_values": first.new_zeros(2, config.num_channels, *size)}
    decoder = ["decoder_input_ids"] if getattr(config, "is_encoder_decoder", False) else []
    names = ["input_ids", "attention_mask", *decoder]
    return {name: torch.ones(2, 8, dtype=torch.long, device=first.device) for name in names}


@contextmanager
def _in_use(model: Any, use_cache: bool) -> Iterator[None]:
    """A model in eval mode with another `use_cache` in its config, for a while."""
    before, modes = getattr(model.config, "use_cache", None), {m: m.training for m in model.modules()}
    model.config.use_cache = use_cache
    model.eval()
    try:
        yield
    finally:
        for module, training in modes.items():
            module.training = training
        if before is None:
            del model.config.use_cache
        else:
            model.config.use_cache = before
