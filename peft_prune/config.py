"""The configuration that all pruning methods share."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import InitVar, dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Optional, Union

from peft import PeftConfig

from .config_checks import (
    check_flag,
    check_names,
    check_number,
    check_stored_form,
    check_targets,
    check_verbalizer,
    plain,
)
from .config_record import check_config, checksums_for
from .model_card import add_loading_instructions
from .recipe import Recipe
from .selection.granularity import NMGranularity, parse_granularity
from .storage.codec import VERSION


DEFAULT_SPARSITY = 0.5


class _Derived(float):
    """A density that was read from a config, and not given by the user."""


@dataclass
class PruningConfig(PeftConfig):
    """
    Fields of every pruning method: where to prune, and how much. The config also records the result.

    Args:
        sparsity (`float`, *optional*):
            Share of the target weights to remove, in [0, 1). Give this or `density`; 0.5 if neither is given.
        density (`float`, *optional*):
            Share of the target weights to keep, `1 - sparsity`, in (0, 1].
        target_modules (`Union[list[str], str]`, *optional*):
            Names of the modules to prune, as for LoRA: a list of suffixes, a regular expression, or `"all-linear"`. By
            default the linear layers inside the numbered blocks: no head, no pooler, no embeddings.
        exclude_modules (`Union[list[str], str]`, *optional*):
            Names of modules to leave alone, a list of suffixes or a regular expression.
        layers_to_transform (`Union[list[int], int]`, *optional*):
            Numbers of the blocks to prune.
        layers_pattern (`Union[list[str], str]`, *optional*):
            Name of the `ModuleList` that holds the blocks, if it is an uncommon one.
        target_parameters (`list[str]`, *optional*):
            Not supported, raises an error: masks are put on modules. Experts that a mixture-of-experts model holds as
            parameters stay dense.
        modules_to_save (`list[str]`, *optional*):
            Modules that are trained in full and saved with the masks, for instance the classifier.
        init_weights (`bool`):
            If `False`, scores are random and pruning is at its final sparsity from the start. For tests.
        verbalizer (`dict`, *optional*):
            Label words that make a classifier of a frozen masked-LM head, from [`peft_prune.make_verbalizer`].
        finalized (`bool`):
            Whether the masks are final. Set by [`peft_prune.finalize`].
        check_base (`bool`):
            Whether loading a final mask checks that the base model is the one the mask was made for. To load it on
            another one anyway, set it to `False` in the config and pass that to `from_pretrained`.
        check_tensors (`bool`):
            Whether loading compares tensors and config with their checksums, and rejects NaN. Set it to `False` in
            `adapter_config.json` if you edited the files on purpose.
        checksums (`dict`, *optional*):
            Checksums of the config and of the tensors other than masks. Written by `save_pretrained`.
        mask_info (`dict`, *optional*):
            Shape, number of kept weights, checksum of each final mask, samples of its base weight. Written by
            [`peft_prune.finalize`].
        mask_format (`int`):
            Version of the stored form of masks.

    Raises:
        ValueError: a field is out of range or contradicts another one; the message names field, value and fix.
    """

    # records of what the tuner handed out last, until the config is saved; empty if out of reach
    tensors_when_saved: ClassVar[Optional[dict[str, Any]]] = None
    # sparsity of a training checkpoint, for its README.md: known once a model has been saved, and no part of the file
    sparsity_when_saved: ClassVar[Optional[float]] = None
    granularity = "weight"

    sparsity: Optional[float] = field(default=None, metadata={"help": "Share of weights removed, in [0, 1)."})
    density: InitVar[Optional[float]] = None
    target_modules: Optional[Union[list[str], str]] = field(
        default=None, metadata={"help": "Modules to prune; by default the linear layers inside the numbered blocks."}
    )
    exclude_modules: Optional[Union[list[str], str]] = field(default=None, metadata={"help": "Modules to leave alone."})
    layers_to_transform: Optional[Union[list[int], int]] = field(
        default=None, metadata={"help": "Numbers of the blocks to prune."}
    )
    layers_pattern: Optional[Union[list[str], str]] = field(
        default=None, metadata={"help": "Name of the ModuleList that holds the blocks."}
    )
    target_parameters: Optional[list[str]] = field(
        default=None, metadata={"help": "Not supported with pruning methods."}
    )
    modules_to_save: Optional[list[str]] = field(
        default=None, metadata={"help": "Modules trained in full and saved with the masks, such as the classifier."}
    )
    init_weights: bool = field(default=True, metadata={"help": "False: random scores at final sparsity, for tests."})
    verbalizer: Optional[dict[str, Any]] = field(
        default=None, metadata={"help": "Label words over a frozen masked-LM head, from make_verbalizer."}
    )
    check_base: bool = field(default=True, metadata={"help": "Refuse a base model that the mask was not made for."})
    check_tensors: bool = field(default=True, metadata={"help": "Compare file and config with their checksums."})
    checksums: Optional[dict[str, Any]] = field(default=None, metadata={"help": "Of config and tensors, when saved."})
    finalized: bool = field(default=False, metadata={"help": "Whether the masks are final."})
    mask_info: Optional[dict[str, dict[str, Any]]] = field(
        default=None, metadata={"help": "Shape, kept weights and checksum of each final mask."}
    )
    mask_format: int = field(default=VERSION, metadata={"help": "Version of the stored form of masks."})

    def __post_init__(self, density: Optional[float] = None):
        super().__post_init__()
        check_names(self)
        if isinstance(self.target_modules, list):
            self.target_modules = set(self.target_modules)  # type: ignore[assignment]
        if isinstance(self.exclude_modules, list):
            self.exclude_modules = set(self.exclude_modules)  # type: ignore[assignment]
        check_targets(self)
        self._resolve_sparsity(density)
        check_flag("init_weights", self.init_weights)
        check_stored_form(self)
        check_verbalizer(self.verbalizer)
        check_config(self)

    def __setattr__(self, name: str, value: Any) -> None:
        # whatever the field, and whenever it is set: JSON cannot write NumPy's numbers, and tells only after training
        super().__setattr__(name, plain(value))

    def refuse_sparsity(self, density: Optional[float], why: str) -> None:
        """For methods that find the sparsity: 0 until it is known, and never given."""
        density = plain(density)
        asked = density is not None and not isinstance(density, _Derived)
        if not self.finalized and (asked or self.sparsity not in (None, 0.0)):
            given = f"density={density!r}" if asked else f"sparsity={self.sparsity!r}"
            raise ValueError(f"{given} cannot be set here: {why}")
        if self.sparsity is None:
            self.sparsity = 0.0

    def _resolve_sparsity(self, density: Optional[float]) -> None:
        density = plain(density)
        if isinstance(density, _Derived) and self.sparsity is not None:
            density = None  # dataclasses.replace hands on what it read
        if density is not None:
            if self.sparsity is not None:
                raise ValueError(f"Give sparsity={self.sparsity!r} or density={density!r}, not both.")
            check_number("density", density, 0.0, 1.0, "It is the share of weights kept, e.g. density=0.1.")
            if density == 0:
                raise ValueError("density=0 would remove every weight. Use a positive density, e.g. density=0.1.")
            self.sparsity = 1.0 - density
        pattern = None if self.granularity == "head" else parse_granularity(self.granularity)
        if isinstance(pattern, NMGranularity):
            reached = 1.0 - pattern.density
            if self.sparsity is not None and abs(self.sparsity - reached) > 1e-9 and not self.finalized:
                raise ValueError(
                    f"sparsity={self.sparsity!r} cannot be reached with granularity={self.granularity!r}, which "
                    f"removes exactly {reached:g}. Leave sparsity out, or use another pattern."
                )
            if self.sparsity is None or not self.finalized:  # training may have ended before the pattern was reached
                self.sparsity = reached
        if self.sparsity is None:
            self.sparsity = DEFAULT_SPARSITY
        fix = "It is the share of weights removed, e.g. sparsity=0.9."
        check_number("sparsity", self.sparsity, 0.0, 1.0, fix, open_high=True)

    def save_pretrained(self, save_directory: str, **kwargs: Any) -> None:
        """Save as PEFT does, and let the README.md that PEFT put there say how to load the adapter."""
        folder, before = Path(save_directory), self.checksums
        self.checksums = checksums_for(self, folder)
        try:
            super().save_pretrained(save_directory, **kwargs)
        finally:
            self.checksums, self.tensors_when_saved = before, None  # type: ignore[misc]
        # an adapter that is not called "default" is saved below the folder that holds the README.md
        add_loading_instructions(folder if (folder / "README.md").exists() else folder.parent, self)

    def recipe(self) -> Recipe:
        """What the method is: importance × rule × update × moment. Each method's config says its own."""
        raise NotImplementedError(f"{type(self).__name__} has no recipe.")

    def doubts(self, total_steps: int, learning_rate: Optional[float] = None, decays: bool = True) -> list[str]:
        """Why a training is unlikely to work as it is set up: sentences that name field, value and fix.

        Args:
            total_steps (`int`): optimizer steps of the training.
            learning_rate (`float`, *optional*): of everything but scores.
            decays (`bool`): whether learning rates decay to 0.
        """
        return []


def reads_old_files(*names: str, **then: Any) -> Callable[[type], type]:
    """Have a config class read its files of earlier versions as they were meant.

    Args:
        names (`str`): fields that these files hold, and that nothing read. They are ignored; given by hand, and not
            from a file, they are a `TypeError` as for any dataclass.
        then: fields that these files lack, and the values that did what was done before there was such a field.
    """

    def wrap(cls: type) -> type:
        original = cls.__init__  # type: ignore[misc]

        @functools.wraps(original)
        def init(self: Any, *args: Any, **kwargs: Any) -> None:
            if "peft_type" in kwargs and "mask_format" in kwargs:  # as a file has them
                kwargs = then | {name: value for name, value in kwargs.items() if name not in names}
            original(self, *args, **kwargs)

        cls.__init__ = init  # type: ignore[misc]
        return cls

    return wrap


# what every config had before each held only what its method uses
FIELDS_OF_ALL = (
    "allocation", "allocation_temperature", "granularity", "initial_sparsity", "mask_interval", "penalty",
    "penalty_schedule", "schedule_end", "schedule_start", "score_init", "score_lr", "score_rank", "sparsity_pattern",
    "sparsity_schedule", "total_steps",
)  # fmt: skip

# `density` is only another way to give the sparsity; reading it back derives it, so that the two cannot disagree.
setattr(PruningConfig, "density", property(lambda self: _Derived(1.0 - self.sparsity)))  # noqa: B010
