"""What PEFT's tests ask for and pruning cannot give, or gives in another way. Each entry is expected to fail.

An entry that passes is reported as a failure: it has to go from this list.
"""

from __future__ import annotations

from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Optional


@dataclass(frozen=True)
class Contradiction:
    """
    Args:
        test (`str`): pattern of the test's function and parameters, with round brackets: `"test_training(*gpt2*)"`.
        methods (`str`): pattern of the method's label.
        reason (`str`): why it cannot pass.
    """

    test: str
    methods: str
    reason: str


_UNKNOWN = ("GPTJForCausalLM", "Gemma3ForCausalLM", "BartForConditionalGeneration", "-DebertaModel")
_NO_ANATOMY = (
    "Where heads and neurons of this architecture live is not known to us, so they cannot be removed; the adapter is "
    "refused with a ValueError that says so. The other methods work."
)
_NOT_TRAINED = "P-pruning trains nothing: it has no parameters, so no gradient, no dtype and no NaN to look for."
_DSEE_PRUNES_ALL = (
    "DSEE prunes all linear layers inside the blocks unless `prune_target_modules` says otherwise, and the test names "
    "one of them in `modules_to_save` of another adapter. A module cannot be both."
)
_ONE_AT_A_TIME = (
    "Each of the two adapters brings weights of its own for the same matrix, of which only one can be in force. It is "
    "refused with a ValueError. (Masks alone can be active together.)"
)
_FIRST = (
    "Sparsity grows on a schedule, which the test's training loop does not advance (`update_schedule`); before it is "
    "advanced, scores alone prune nothing."
)
_GATES = "The gates of l0 start a little below 1, as in the paper: a fresh adapter is not the identity."
_SHRINKS = (
    "Merging takes the heads and neurons out, so the merged model has smaller matrices, which the test loads into a "
    "model of the old shape. `merge_and_unload(shrink=False)` keeps the shape."
)
_OWN_DEFAULTS = (
    "Default targets are found in the model, not looked up in LoRA's table of model types, which the test fills."
)

CONTRADICTIONS: tuple[Contradiction, ...] = (
    *(Contradiction(f"*{model}*", method, _NO_ANATOMY) for model in _UNKNOWN for method in ("SMP head", "PPRUNING")),
    Contradiction("test_adapter_name(*", "PPRUNING", _NOT_TRAINED),
    Contradiction("test_add_adapter_no_autocast_adapter_dtype(*", "PPRUNING", _NOT_TRAINED),
    Contradiction("test_training*", "PPRUNING", _NOT_TRAINED),
    Contradiction("test_merge_layers_nan(*", "PPRUNING", _NOT_TRAINED),
    Contradiction("test_inference_safetensors(*", "PPRUNING", _NOT_TRAINED),
    Contradiction("test_merge_layers(*", "PPRUNING", _SHRINKS),
    Contradiction("test_merge_layers(*", "SMP head", _SHRINKS),
    # the others of SMP train a module beside, which changes the output
    Contradiction("test_disable_adapters*(SMP MLP [!5]*", "SMP", _FIRST),
    Contradiction("test_disable_adapters*(SMP * Conv1D 1)", "SMP", _FIRST),
    Contradiction("test_disable_adapters(*", "MOVEMENT l0", _GATES),
    Contradiction("test_disable_adapters_with_merging(*", "MOVEMENT l0", _GATES),
    Contradiction("test_multiple_active_adapters_forward(* same)", "MOVEMENT *", _ONE_AT_A_TIME),
    Contradiction("test_multiple_active_adapters_forward(* same)", "DSEE", _ONE_AT_A_TIME),
    Contradiction("test_multiple_active_adapters_merge_and_unmerge(* same)", "MOVEMENT *", _ONE_AT_A_TIME),
    Contradiction("test_multiple_active_adapters_merge_and_unmerge(* same)", "DSEE", _ONE_AT_A_TIME),
    Contradiction("test_set_adapter_non_overlapping_modules_to_save(*", "DSEE", _DSEE_PRUNES_ALL),
    Contradiction("test_set_requires_grad(*", "DSEE", _DSEE_PRUNES_ALL),
    Contradiction("test_multiple_active_adapters_with_*_modules_to_save_*", "DSEE", _DSEE_PRUNES_ALL),
    Contradiction("test_default_target_modules_*str(*", "SMP", _OWN_DEFAULTS),
    Contradiction("test_default_target_modules_*str(*", "MOVEMENT hard", _OWN_DEFAULTS),
)


def contradiction(label: str, test: str) -> Optional[Contradiction]:
    """The entry that a test of a method falls under, `None` if there is none."""
    function = test.split("::")[-1].replace("[", "(").replace("]", ")")
    for entry in CONTRADICTIONS:
        if fnmatchcase(label, entry.methods) and fnmatchcase(function, entry.test):
            return entry
    return None
