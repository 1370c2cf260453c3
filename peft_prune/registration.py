"""Makes PEFT know the pruning methods. The only file that touches PEFT's enum and maps."""

from __future__ import annotations

from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING
from peft.utils import PeftType, register_peft_method


def _extend_peft_type(name: str) -> None:
    """Add a member to `PeftType`, a closed `str` enum with no public way to do so."""
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


def register_method(name: str, config_cls: type, model_cls: type) -> None:
    """Register a pruning method with PEFT under `name`; a second call for the same classes does nothing.

    Args:
        name (`str`): lower case, without a trailing underscore; `name + "_"` prefixes the method's parameters.
        config_cls (`type`): subclass of [`PruningConfig`].
        model_cls (`type`): subclass of [`PruningModel`].

    Raises:
        ImportError: PEFT itself, or another package, has taken the name or the prefix.
    """
    type_name = name.upper()
    if type_name in PeftType._member_map_:
        taken_by = PEFT_TYPE_TO_CONFIG_MAPPING.get(PeftType(type_name))
        if taken_by is config_cls:
            return
        owner = f"{taken_by.__module__}.{taken_by.__qualname__}" if taken_by else "PEFT's own list of types"
        raise ImportError(
            f"peft_prune cannot register {type_name!r}: PEFT already has a method of that name, from {owner}. "
            "Upgrade peft_prune, or remove the other package."
        )
    prefix = name + "_"
    if prefix in PEFT_TYPE_TO_PREFIX_MAPPING.values():
        raise ImportError(f"peft_prune cannot register {type_name!r}: the parameter prefix {prefix!r} is taken.")
    _extend_peft_type(type_name)
    register_peft_method(name=name, config_cls=config_cls, model_cls=model_cls)
