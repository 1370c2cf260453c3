"""The tensors of an adapter file against their records: noted when PEFT saves, compared when it loads."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import nn

from ..config_record import check_tensors, describe_tensors
from ..peft_api import AuxiliaryTrainingWrapper


_PLAIN = (torch.Tensor, nn.Parameter)


def note_tensors(
    tuner: Any,
    model: nn.Module,
    config: Any,
    adapter_name: str,
    state_dict: Mapping[str, torch.Tensor],
    found: Mapping[str, torch.Tensor],
) -> None:
    """Remember what PEFT is about to save of an adapter, for `PruningConfig.save_pretrained`.

    Args:
        tuner: the tuner's class.
        model: the model that is saved.
        config ([`PruningConfig`]): the adapter's configuration.
        adapter_name (`str`): name of the adapter.
        state_dict: the model's tensors.
        found: those of the tuner's own among them; PEFT adds those of `modules_to_save`.
    """
    tensors = {tuner._remove_adapter_name_from_key(key, adapter_name): t for key, t in found.items()}
    for name, module in model.named_modules():
        if isinstance(module, AuxiliaryTrainingWrapper):
            own = {key.removeprefix(f"{name}."): t for key, t in state_dict.items() if key.startswith(f"{name}.")}
            try:
                saved = cast(Any, module).adapter_state_dict(adapter_name, own)
                tensors |= {f"{name}.{key}": tensor for key, tensor in saved.items()}
            except KeyError:  # names that a wrapper such as FSDP's has changed
                config.tensors_when_saved = {}
                return
    within_reach = all(type(t) in _PLAIN and not t.is_meta for t in tensors.values())  # no shards
    config.tensors_when_saved = describe_tensors(config, tensors.items()) if within_reach else {}


def check_file(model: nn.Module, config: Any, adapter_name: str, state_dict: Mapping[str, torch.Tensor]) -> None:
    """Compare what was read with the records in the config, once: later states that are set are not of this file.

    Args:
        model: the model, with the adapter in place.
        config ([`PruningConfig`]): the adapter's configuration.
        adapter_name (`str`): name of the adapter.
        state_dict: tensors by key in the file, but with PEFT's names for `modules_to_save`.

    Raises:
        MaskFormatError: a tensor is missing, superfluous, damaged, or holds NaN.
    """
    stored = {}
    for name, module in model.named_modules():
        if isinstance(module, AuxiliaryTrainingWrapper):
            for key, place in module.adapter_state_dict_load_map(adapter_name).items():
                stored[f"{name}.{place}"] = f"{name}.{key}"
    check_tensors(config, {stored.get(key, key): tensor for key, tensor in state_dict.items()})
    config.checksums = None


def check_label_words(spec: Mapping[str, Any], model: nn.Module) -> None:
    """Raise `ValueError` if a verbalizer has token ids that the model's vocabulary has not."""
    head: Any = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None  # type: ignore
    largest = max([*spec["token_ids"], spec["mask_token_id"] or 0])
    if isinstance(head, nn.Linear) and largest >= head.out_features:
        raise ValueError(
            f"verbalizer: token id {largest} is not among the {head.out_features} of this model. Load the base model "
            "that the adapter was made for, or make the verbalizer with its tokenizer."
        )
