"""The one door to what PEFT, and Transformers where it serves PEFT, keep private or closed.

Everything that this package touches beyond their documented interfaces is here, with the reason. A test checks that
each name exists and takes what we pass, so a release that moves one fails in one place. `docs/peft_proposals.md`
proposes hooks that would make most of it unnecessary.

Two more habits of PEFT that the package follows: "all-linear" finds a linear layer that is adapted already by "Linear"
in the name of its class, so our classes of linear layers have it; and a tuner's parameters are found by their prefix.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from peft import PeftModel
from peft.config import PeftConfigMixin
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING
from peft.tuners._buffer_dict import BufferDict
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer, check_adapters_to_merge
from peft.tuners.tuners_utils import _maybe_include_all_linear_layers as include_all_linear
from peft.utils import PeftType
from peft.utils.constants import INCLUDE_LINEAR_LAYERS_SHORTHAND as ALL_LINEAR
from peft.utils.constants import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING as LORA_TARGETS
from peft.utils.other import AuxiliaryTrainingWrapper, ModulesToSaveWrapper
from transformers import PreTrainedModel


__all__ = [
    "ALL_LINEAR",
    "LORA_TARGETS",
    "METHODS_WE_REPLACE",
    "PEFT_TYPE_TO_CONFIG_MAPPING",
    "PEFT_TYPE_TO_PREFIX_MAPPING",
    "AuxiliaryTrainingWrapper",
    "BaseTuner",
    "BaseTunerLayer",
    "BufferDict",
    "ModulesToSaveWrapper",
    "PeftConfigMixin",
    "PeftType",
    "base_of",
    "check_adapters_to_merge",
    "extend_peft_type",
    "include_all_linear",
    "replace_method",
]

# each with what it would take to do without
METHODS_WE_REPLACE: dict[tuple[type, str], str] = {
    (PeftModel, "_upload_modified_files"): "push_to_hub writes its own model card over ours, without a hook",
    (PeftConfigMixin, "from_json_file"): "an unknown peft_type is a bare KeyError, before a class of ours is reached",
    (PeftModel, "load_adapter"): "under a name that exists, no config is read, so no checksum is known",
    (PreTrainedModel, "load_adapter"): "calls no hook of the tuner after it has read the file",
    (PreTrainedModel, "save_pretrained"): "has no hook that could record checksums of a compact model",
    (PreTrainedModel, "_upload_modified_files"): "the same for push_to_hub",
    (BaseTuner, "merge_adapter"): "merges the outer of two nested adapters first",
    (BaseTuner, "_unload_and_optionally_merge"): "unloads the inner of two nested adapters without merging it",
}


def base_of(model: Any) -> Any:
    """The model that a `PeftModel` wraps, adapters included; any other model as it is."""
    return model.get_base_model() if isinstance(model, PeftModel) else model


def replace_method(owner: type, name: str, make: Callable[[Any], Callable[..., Any]]) -> None:
    """Replace a method of another package by one that does more for pruning adapters; a second call does nothing.

    Args:
        owner (`type`): the class, one of [`METHODS_WE_REPLACE`].
        name (`str`): the method.
        make (`Callable`): given the original, returns the replacement, which calls it.
    """
    if (owner, name) not in METHODS_WE_REPLACE:
        raise KeyError(f"{owner.__name__}.{name} is not listed in METHODS_WE_REPLACE.")
    held = vars(owner).get(name, getattr(owner, name))
    original = held.__func__ if isinstance(held, classmethod) else held
    if getattr(original, "replaced_by_peft_prune", False):
        return
    replacement: Any = functools.wraps(original)(make(original))
    replacement.replaced_by_peft_prune = True
    setattr(owner, name, classmethod(replacement) if isinstance(held, classmethod) else replacement)


def extend_peft_type(name: str) -> None:
    """Add a member to `PeftType`, a closed `str` enum without a public way to do so; PEFT registers only members."""
    member = str.__new__(PeftType, name)
    member._name_ = name
    member._value_ = name
    member.__objclass__ = PeftType  # type: ignore[attr-defined]
    member._sort_order_ = len(PeftType._member_names_)  # type: ignore[attr-defined]
    PeftType._member_map_[name] = member
    PeftType._member_names_.append(name)
    PeftType._value2member_map_[name] = member
    if hasattr(PeftType, "_hashable_values_"):  # Python 3.13+
        PeftType._hashable_values_.append(name)  # type: ignore[attr-defined]
    # PeftType.SMP is found by the metaclass's __getattr__ up to 3.11 and has to be an attribute from 3.12 on
    type.__setattr__(PeftType, name, member)
