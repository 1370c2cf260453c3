"""Makes PEFT know the pruning methods."""

from __future__ import annotations

from peft.utils import register_peft_method

from ..peft_api import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING, PeftType, extend_peft_type


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
    extend_peft_type(type_name)
    register_peft_method(name=name, config_cls=config_cls, model_cls=model_cls)
