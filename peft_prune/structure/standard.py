"""Smaller models as ordinary checkpoints, which Transformers loads without this package."""

from __future__ import annotations

import copy
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import torch
import transformers
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from .fields import Fields, fields_of
from .per_layer import PER_LAYER
from .record import FIELD
from .seal import SEAL
from .sites import HEADS, Site, find_sites


def save_standard(
    model: nn.Module, save_directory: str | os.PathLike, tokenizer: Any = None, **kwargs: Any
) -> PretrainedConfig:
    """Save a smaller model as an ordinary checkpoint, which `from_pretrained` loads without this package.

    Modelling code has one number of heads and one of neurons for all layers, so every layer must keep as many: prune
    with `shapes="uniform"`. A Llama whose heads no longer divide its hidden size is written as a Mistral without a
    sliding window, which computes the same. Before anything is written, the new config is compared with the weights,
    and the model that is made from both with the one that was given, on random inputs.

    Args:
        model (`PreTrainedModel`): a model after `merge_and_unload()` or [`shrink`], perhaps trained further. Of one
            from which nothing was removed an ordinary checkpoint is written, too.
        save_directory (`str` or `os.PathLike`): folder to write.
        tokenizer (*optional*): a tokenizer or processor to save beside it.
        **kwargs: passed on to `save_pretrained`, for instance `push_to_hub=True`.

    Returns:
        `PretrainedConfig`: the config that was written.

    Raises:
        TypeError: the model is none of Transformers'.
        ValueError: Transformers has no config for its shapes; the message says which option makes it possible.
    """
    if not isinstance(model, PreTrainedModel):
        raise TypeError(
            f"save_standard needs a Transformers model, not {type(model).__name__}. Of a PeftModel save what "
            "model.merge_and_unload() returns."
        )
    plain = standard_model(model)
    plain.save_pretrained(save_directory, **kwargs)
    if tokenizer is not None:
        tokenizer.save_pretrained(save_directory, **kwargs)
    _write_card(Path(save_directory), model, plain)
    return plain.config


def standard_model(model: PreTrainedModel) -> PreTrainedModel:
    """The same weights in a class and with a config of Transformers' own.

    Args:
        model (`PreTrainedModel`): see [`save_standard`].

    Raises:
        ValueError: there is no such config.
    """
    config = standard_config(model)
    model_class: Any = type(model)
    if config.model_type != model.config.model_type:
        model_class = getattr(transformers, model_class.__name__.replace("Llama", "Mistral"), None)
        if model_class is None:
            raise ValueError(f"{type(model).__name__} has no counterpart among Mistral's classes. Use save_compact.")
    _check_shapes(model, config, model_class)
    plain = model_class.from_pretrained(
        None, config=config, state_dict=model.state_dict(), dtype=model.dtype,
        attn_implementation=model.config._attn_implementation,
    )  # fmt: skip
    if getattr(model, "generation_config", None) is not None:
        plain.generation_config = copy.deepcopy(model.generation_config)
    _check_outputs(model, cast(Any, plain).to(model.device))
    return plain


def standard_config(model: PreTrainedModel) -> PretrainedConfig:
    """A config of Transformers' own that describes a model's shapes; of heads and neurons, not of other changes.

    Args:
        model (`PreTrainedModel`): a model without tuner layers.

    Raises:
        ValueError: layers differ, or the architecture has no field for a size.
    """
    config = copy.deepcopy(model.config)
    for name in (FIELD, SEAL, PER_LAYER):
        config.__dict__.pop(name, None)
    record = getattr(model.config, FIELD, None)
    if not record:
        return config
    fields, sites = fields_of(config.model_type), find_sites(model)
    for decoder in (False, True):
        counts = [site.units for site in sites if site.kind != HEADS and site.decoder == decoder]
        if counts:
            name = (fields.decoder if decoder else None) or fields.neurons
            setattr(config, name, _same("neurons", counts))
    _set_heads(config, fields, [site for site in sites if site.kind == HEADS], record)
    if fields.divides and config.hidden_size % config.num_attention_heads:
        return _as_mistral(config)
    return config


def _same(what: str, counts: list[int]) -> int:
    if len(set(counts)) > 1:
        raise ValueError(
            f"save_standard: layers keep from {min(counts)} to {max(counts)} {what}, and Transformers has one number "
            "for all layers. Prune with shapes='uniform', or use save_compact."
        )
    return counts[0]


def _set_heads(config: Any, fields: Fields, sites: list[Site], record: Mapping[str, Any]) -> None:
    if not any(site.key in record for site in sites):
        return
    if fields.heads is None:
        raise ValueError(
            f"save_standard: Transformers has no config for a {config.model_type} with fewer heads, whose number and "
            "width follow from the hidden size. Remove neurons only, for instance with target_modules, or use "
            "save_compact."
        )
    groups = _same("groups of heads", [site.units for site in sites])
    width = _same("numbers in a head", [site.rows[_value(site)].shape[1] for site in sites])
    heads = _same("heads", [site.units * site.width // width for site in sites])
    for name, value in ((fields.heads, heads), (fields.groups, groups), (fields.head_dim, width)):
        setattr(config, str(name), value)


def _value(site: Site) -> str:
    """Name of the projection of values."""
    attention = cast(Any, site.attention)
    return site.output.removesuffix(attention.output) + attention.value


def _as_mistral(config: Any) -> PretrainedConfig:
    """A Llama's config as a Mistral's: the same modules, and the number of heads is free."""
    biased = [name for name in ("attention_bias", "mlp_bias") if getattr(config, name, False)]
    if biased:
        raise ValueError(
            f"save_standard: {config.num_attention_heads} heads do not divide the hidden size {config.hidden_size}, "
            f"as Llama wants it, and as a Mistral it cannot be saved with {biased[0]}=True. Keep a number of heads "
            "that divides the hidden size, or use save_compact."
        )
    left_out = ("model_type", "architectures", "transformers_version", "pretraining_tp", "attention_bias", "mlp_bias")
    fields = {name: value for name, value in config.to_dict().items() if name not in left_out}
    return transformers.MistralConfig(**fields | {"sliding_window": None})


def _check_shapes(model: PreTrainedModel, config: PretrainedConfig, model_class: Any) -> None:
    """Raise `ValueError` if the config describes other weights than the model has."""
    with torch.device("meta"):
        wanted = {name: tuple(tensor.shape) for name, tensor in model_class(config).state_dict().items()}
    found = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    for name in sorted(wanted.keys() | found.keys()):
        if wanted.get(name) != found.get(name):
            raise ValueError(
                f"save_standard: {name!r} has the shape {found.get(name)}, and {model_class.__name__} of Transformers "
                f"wants {wanted.get(name)}. Use save_compact."
            )


def _check_outputs(model: PreTrainedModel, plain: PreTrainedModel) -> None:
    """Raise `ValueError` if two models answer otherwise to random inputs."""
    inputs = _example(model)
    training = model.training
    with torch.no_grad():
        expected, found = (m.eval()(**inputs)[0].float() for m in (model, plain))
    model.train(training)
    most = float((expected - found).abs().max())
    tolerance = (1e-4 if model.dtype == torch.float32 else 2e-2) * max(1.0, float(expected.abs().max()))
    if not most <= tolerance:
        raise ValueError(
            f"save_standard: the model that {type(plain).__name__} makes of the weights answers otherwise, by "
            f"{most:.3g} at most, so it was not written. Use save_compact."
        )


def _example(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    config: Any = model.config
    generator = torch.Generator().manual_seed(0)
    if model.main_input_name == "pixel_values":
        size = config.image_size if isinstance(config.image_size, (list, tuple)) else [config.image_size] * 2
        pixels = torch.randn(2, config.num_channels, *size, generator=generator)
        return {"pixel_values": pixels.to(model.device, model.dtype)}
    ids = torch.randint(config.get_text_config().vocab_size, (2, 12), generator=generator).to(model.device)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    return inputs | ({"decoder_input_ids": ids[:, :5]} if config.is_encoder_decoder else {})


def _write_card(folder: Path, model: PreTrainedModel, plain: PreTrainedModel) -> None:
    """A README.md that says what was done, unless there is one."""
    card = folder / "README.md"
    if card.exists():
        return
    base, size = model.config.name_or_path, sum(p.numel() for p in plain.parameters())
    of = f" of `{base}`" if base else ""
    card.write_text(
        "---\nlibrary_name: transformers\ntags:\n- pruning\n---\n\n"
        f"# A smaller model\n\nHeads, neurons or layers{of} were removed with peft_prune; {size:,} parameters are "
        "left.\n"
        f"It loads without that package:\n\n```python\nfrom transformers import {type(plain).__name__}\n\n"
        f'model = {type(plain).__name__}.from_pretrained("{folder.name}")\n```\n',
        encoding="utf-8",
    )
