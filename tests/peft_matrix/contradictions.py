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
        test (`str`): pattern of the test's function and parameters, with round brackets: `"test_training(*gpt2*)"`, or
            of the module before it as well: `"test_custom_models*test_training(*"`.
        methods (`str`): pattern of the method's label.
        reason (`str`): why it cannot pass.
        error (`str`): regular expression of the error that it ends in; with any other it counts as failed.
    """

    test: str
    methods: str
    reason: str
    error: str


_NO_ANATOMY = (
    "Where heads and neurons of this architecture live is not known to us, so they cannot be removed; the adapter is "
    "refused with a ValueError that says so. The other methods work."
)
_NOT_TRAINED = (
    "P-pruning trains nothing: its adapter has no parameters, so there is no name, dtype or gradient of one to look "
    "for, and none that could be NaN."
)
_DSEE_PRUNES_ALL = (
    "DSEE prunes all linear layers inside the blocks unless `prune_target_modules` says otherwise, and the test names "
    "one of them in `modules_to_save` of another adapter. A module cannot be both."
)
_ONE_AT_A_TIME = (
    "Each of the two adapters brings weights of its own for the same matrix, of which only one can be in force. It is "
    "refused with a ValueError. (Masks alone can be active together.)"
)
_MERGED_ONE_AT_A_TIME = (
    "Each of the two adapters brings weights of its own for the same matrix, and merged one after the other they would "
    "give those of neither. Merging the second is refused with a ValueError. (Masks alone can be merged together.)"
)
_FIRST = (
    "Sparsity grows on a schedule, which the test's training loop does not advance (`update_schedule`); before it is "
    "advanced, scores alone prune nothing."
)
_GATES = "The gates of l0 start a little below 1, as in the paper: a fresh adapter is not the identity."
_SHRINKS = (
    "Merging takes the heads and neurons out, and at its end the test loads the smaller matrices into a model of the "
    "old shape. `save_compact` and `load_compact` do that, `merge_and_unload(shrink=False)` keeps the shape."
)
_OWN_DEFAULTS = (
    "Default targets are found in the model, not looked up in LoRA's table of model types, which the test fills."
)
_NAMES_FEED_FORWARD = (
    "For GPT-J the test names `fc_out` in `target_modules`, which is no projection of heads. It is refused with a "
    "ValueError."
)

# patterns of the errors
_UNKNOWN = "Where heads and neurons of model_type='deberta' live is not known"
_NO_GRADIENT = "does not require grad"
_SEVERAL = r"ValueError: The adapters \[.*\] are active together, and some of them have weights of their own"
_TOGETHER = r"ValueError: The adapters \[.*\] cannot be merged together"
_SAVED_ELSEWHERE = (
    "TypeError: (modules_to_save cannot be applied|Module .* of type ModulesToSaveWrapper cannot be pruned)"
)
_OTHER_SHAPE = "You set `ignore_mismatched_sizes` to `False`"  # from_pretrained, after the outputs were compared
_NO_MODULES = "ValueError: target_modules was not given"
_STILL_DENSE = "assert not True"  # the outputs with and without the adapter are close
_NOT_DENSE = "assert False"  # the outputs of the base model and of a fresh adapter are not close

CONTRADICTIONS: tuple[Contradiction, ...] = (
    Contradiction("*-DebertaModel*", "SMP head", _NO_ANATOMY, _UNKNOWN),
    Contradiction("*-DebertaModel*", "PPRUNING", _NO_ANATOMY, _UNKNOWN),
    # a classifier in `modules_to_save` has parameters under the adapter's name
    Contradiction("test_[!s]*::test_adapter_name(*", "PPRUNING", _NOT_TRAINED, "AssertionError"),
    Contradiction("test_add_adapter_no_autocast_adapter_dtype(*", "PPRUNING", _NOT_TRAINED, "not determine the dtype"),
    Contradiction("test_training*", "PPRUNING", _NOT_TRAINED, _NO_GRADIENT),
    Contradiction("test_inference_safetensors(*", "PPRUNING", _NOT_TRAINED, _NO_GRADIENT),
    Contradiction("test_merge_layers_nan(*", "PPRUNING", _NOT_TRAINED, "DID NOT RAISE"),
    Contradiction("test_merge_layers*GPTJ*", "SMP head", _NAMES_FEED_FORWARD, "has no rows or columns that are heads"),
    Contradiction("test_merge_layers(*", "PPRUNING", _SHRINKS, _OTHER_SHAPE),
    Contradiction("test_merge_layers(*", "SMP head", _SHRINKS, _OTHER_SHAPE),
    # "MLP 5" and "Conv1D 2" train a module beside, which changes the output
    Contradiction("test_disable_adapters(SMP MLP [!5]*", "SMP", _FIRST, _STILL_DENSE),
    Contradiction("test_disable_adapters(SMP * Conv1D 1)", "SMP", _FIRST, _STILL_DENSE),
    Contradiction("test_disable_adapters_with_merging(SMP MLP [!5]*", "SMP", _FIRST, _STILL_DENSE),
    Contradiction("test_disable_adapters_with_merging(SMP * Conv1D 1)", "SMP", _FIRST, _STILL_DENSE),
    Contradiction("test_disable_adapters(*", "MOVEMENT l0", _GATES, _NOT_DENSE),
    Contradiction("test_disable_adapters_with_merging(*", "MOVEMENT l0", _GATES, _NOT_DENSE),
    Contradiction("test_multiple_active_adapters_forward(* same)", "MOVEMENT *", _ONE_AT_A_TIME, _SEVERAL),
    Contradiction("test_multiple_active_adapters_forward(* same)", "DSEE", _ONE_AT_A_TIME, _SEVERAL),
    Contradiction("test_multiple_active_adapters_merge_and_unmerge(* same)", "MOVEMENT *", _ONE_AT_A_TIME, _SEVERAL),
    Contradiction("test_multiple_active_adapters_merge_and_unmerge(* same)", "DSEE", _ONE_AT_A_TIME, _SEVERAL),
    Contradiction("test_merge_layers_multi(*[!t])", "MOVEMENT *", _MERGED_ONE_AT_A_TIME, _TOGETHER),  # not "different"
    Contradiction("test_merge_layers_multi(*[!t])", "DSEE", _MERGED_ONE_AT_A_TIME, _TOGETHER),
    Contradiction("test_*sequential_merge_*(* same)", "MOVEMENT *", _MERGED_ONE_AT_A_TIME, _TOGETHER),
    Contradiction("test_*sequential_merge_*(* same)", "DSEE", _MERGED_ONE_AT_A_TIME, _TOGETHER),
    Contradiction("test_set_adapter_non_overlapping_modules_to_save(*", "DSEE", _DSEE_PRUNES_ALL, _SAVED_ELSEWHERE),
    Contradiction("test_set_requires_grad(*", "DSEE", _DSEE_PRUNES_ALL, _SAVED_ELSEWHERE),
    Contradiction(
        "test_multiple_active_adapters_with_[!s]*_modules_to_save_*", "DSEE", _DSEE_PRUNES_ALL, _SAVED_ELSEWHERE
    ),
    Contradiction("test_default_target_modules_*str(*", "SMP", _OWN_DEFAULTS, _NO_MODULES),
    Contradiction("test_default_target_modules_*str(*", "MOVEMENT hard", _OWN_DEFAULTS, _NO_MODULES),
)


def contradiction(label: str, test: str) -> Optional[Contradiction]:
    """The entry that a test of a method falls under, `None` if there is none."""
    whole = test.replace("[", "(").replace("]", ")")
    function = whole.split("::")[-1]
    for entry in CONTRADICTIONS:
        if fnmatchcase(label, entry.methods) and (fnmatchcase(function, entry.test) or fnmatchcase(whole, entry.test)):
            return entry
    return None
