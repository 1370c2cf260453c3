"""The configuration that all pruning methods share, and its checks."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import InitVar, dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Optional, Union

from peft import PeftConfig

from .masks.allocation import ALLOCATIONS
from .masks.codec import READABLE, VERSION, is_mask_info
from .masks.granularity import NMGranularity, parse_granularity
from .masks.importance import SCORE_INITS
from .masks.schedule import CURVES, Schedule
from .model_card import add_loading_instructions


DEFAULT_SPARSITY = 0.5


def _check_number(name: str, value: Any, low: float, high: float, fix: str, open_high: bool = False) -> None:
    bad = isinstance(value, bool) or not isinstance(value, (int, float))
    if bad or not low <= value <= high or (open_high and value == high):
        end = ")" if open_high else "]"
        raise ValueError(f"{name}={value!r} must be a number in [{low:g}, {high:g}{end}. {fix}")


def _check_choice(name: str, value: Any, choices: Sequence[str]) -> None:
    if value not in choices:
        raise ValueError(f"{name}={value!r} is unknown. Use one of {', '.join(map(repr, choices))}.")


class _Derived(float):
    """A density that was read from a config, and not given by the user."""


@dataclass
class PruningConfig(PeftConfig):
    """
    What every pruning method is told: where to prune, how much, at which granularity, along which schedule.

    Args:
        sparsity (`float`, *optional*):
            Share of the target weights that is removed, in [0, 1). Give this or `density`; 0.5 if neither is given.
        density (`float`, *optional*):
            Share of the target weights that is kept, `1 - sparsity`, in (0, 1].
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
            Not possible, and refused: masks are put on modules. Experts that a mixture-of-experts model holds as
            parameters stay dense.
        modules_to_save (`list[str]`, *optional*):
            Modules that are trained in full and saved beside the masks, for instance the classifier.
        sparsity_pattern (`dict[str, float]`, *optional*):
            Sparsity of single modules, by name or regular expression, as LoRA's `rank_pattern`. These modules take no
            part in `allocation`.
        allocation (`str`):
            How the density is shared out among the matrices: `"local"` (each has the same), `"score"` (matrices of the
            same kind share theirs by mean score) or `"global"` (one threshold for all scores).
        allocation_temperature (`float`, *optional*):
            For `allocation="score"`: scores are divided by it first. By default 1, and 3 for a density of 0.5 or more.
        granularity (`str`):
            What is kept or removed as one: `"weight"`; an n:m pattern such as `"2:4"`, two of every four weights along
            the input; a block such as `"32x32"` (out × in); `"row"` or `"column"`, an output or an input of a matrix;
            or `"head"`, the rows or columns of an attention head.
        initial_sparsity (`float`):
            Sparsity at the beginning of training.
        sparsity_schedule (`str`):
            `"cubic"`, `"linear"` or `"constant"`: how sparsity goes from `initial_sparsity` to `sparsity`.
        schedule_start (`float`):
            Share of training, in [0, 1), at which sparsity begins to grow.
        schedule_end (`float`):
            Share of training, in (0, 1], at which it has reached `sparsity`. It stays there.
        total_steps (`int`, *optional*):
            Number of optimizer steps of the training. `PruningCallback` fills it in.
        penalty (`float`):
            Final weight λ of the penalty on the scores, `λ · mean(sigmoid(S))`. 0 turns it off.
        penalty_schedule (`str`):
            `"cubic"`, `"linear"` or `"constant"`: how λ rises over the whole of training.
        score_init (`str`):
            Where scores start: `"zeros"`, `"magnitude"` (`|W| / std(W)`), `"random"`, or all at a number.
        score_lr (`float`):
            Learning rate that `PruningTrainer` and `create_pruning_optimizer` give the scores unless told otherwise.
        score_rank (`int`):
            Rank of the scores of methods that offer `score="low_rank"`. The default trains as many numbers as a LoRA of
            rank 8 does.
        mask_interval (`int`):
            Number of optimizer steps after which sparsity and masks are computed anew. With more than 1, a training
            that is resumed computes its masks at the checkpoint, and so may end with slightly other ones.
        init_weights (`bool`):
            If `False`, scores are random and pruning is at its final sparsity from the start. For tests.
        verbalizer (`dict`, *optional*):
            Label words that make a classifier of a frozen masked-LM head, from [`peft_prune.make_verbalizer`].
        finalized (`bool`):
            Whether the masks are final. Set by [`peft_prune.finalize`].
        check_base (`bool`):
            Whether loading a final mask checks that the base model is the one the mask was made for. To load it on
            another one all the same, set it to `False` in the config and pass that to `from_pretrained`.
        mask_info (`dict`, *optional*):
            Shape, number of kept weights, checksum of each final mask, samples of its base weight. Written by
            [`peft_prune.finalize`].
        mask_format (`int`):
            Version of the stored form of masks.

    Raises:
        ValueError: a field is out of range or contradicts another one; the message names field, value and fix.
    """

    # whether the adapter is trained at all, and what to tell who uses one before it has masks
    trains: ClassVar[bool] = True
    without_mask: ClassVar[str] = ""
    # of what is trained: an update of the weights beside the scores; gates instead of a mask; the penalty's offset
    updates_weights: ClassVar[bool] = False
    stores_values: ClassVar[bool] = False
    gated: ClassVar[bool] = False
    penalty_offset: ClassVar[float] = 0.0
    # whether the sparsity comes out of training, instead of being given
    finds_sparsity: ClassVar[bool] = False
    # at least this share of each matrix stays when scores are compared with a threshold
    min_density: ClassVar[float] = 0.0
    value_dtype: ClassVar[str] = "float32"
    # where scores come from: "low_rank" if they are held as factors
    score: ClassVar[Optional[str]] = "movement"
    from_existing_zeros: ClassVar[bool] = False

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
        default=None, metadata={"help": "Not possible with pruning methods, and refused."}
    )
    modules_to_save: Optional[list[str]] = field(
        default=None, metadata={"help": "Modules trained in full and saved beside the masks, such as the classifier."}
    )
    sparsity_pattern: Optional[dict[str, float]] = field(
        default_factory=dict, metadata={"help": "Sparsity of single modules, by name or regular expression."}
    )
    allocation: str = field(default="local", metadata={"help": "'local', 'score' or 'global'."})
    allocation_temperature: Optional[float] = field(
        default=None, metadata={"help": "Temperature of allocation='score'; 1, or 3 from density 0.5 on."}
    )
    granularity: str = field(
        default="weight", metadata={"help": "'weight', '2:4', '32x32', 'row', 'column' or 'head'."}
    )
    initial_sparsity: float = field(default=0.0, metadata={"help": "Sparsity at the beginning of training."})
    sparsity_schedule: str = field(default="cubic", metadata={"help": "'cubic', 'linear' or 'constant'."})
    schedule_start: float = field(default=0.0, metadata={"help": "Share of training at which sparsity begins to grow."})
    schedule_end: float = field(default=0.6, metadata={"help": "Share of training at which sparsity is final."})
    total_steps: Optional[int] = field(default=None, metadata={"help": "Optimizer steps of the training."})
    penalty: float = field(default=0.0, metadata={"help": "Final weight of the penalty on the scores."})
    penalty_schedule: str = field(default="cubic", metadata={"help": "'cubic', 'linear' or 'constant'."})
    score_init: Union[str, float] = field(
        default="zeros", metadata={"help": "'zeros', 'magnitude', 'random', or a number."}
    )
    score_lr: float = field(default=2e-2, metadata={"help": "Learning rate of the scores."})
    score_rank: int = field(default=7, metadata={"help": "Rank of the scores with score='low_rank'."})
    mask_interval: int = field(default=1, metadata={"help": "Optimizer steps after which masks are computed anew."})
    init_weights: bool = field(default=True, metadata={"help": "False: random scores at final sparsity, for tests."})
    verbalizer: Optional[dict[str, Any]] = field(
        default=None, metadata={"help": "Label words over a frozen masked-LM head, from make_verbalizer."}
    )
    check_base: bool = field(default=True, metadata={"help": "Refuse a base model that the mask was not made for."})
    finalized: bool = field(default=False, metadata={"help": "Whether the masks are final."})
    mask_info: Optional[dict[str, dict[str, Any]]] = field(
        default=None, metadata={"help": "Shape, kept weights and checksum of each final mask."}
    )
    mask_format: int = field(default=VERSION, metadata={"help": "Version of the stored form of masks."})

    def __post_init__(self, density: Optional[float] = None):
        super().__post_init__()
        if isinstance(self.target_modules, list):
            self.target_modules = set(self.target_modules)  # type: ignore[assignment]
        if isinstance(self.exclude_modules, list):
            self.exclude_modules = set(self.exclude_modules)  # type: ignore[assignment]
        self._check_targets()
        self._resolve_sparsity(density)
        self._check_allocation()
        self._check_schedule()
        self._check_training()
        self._check_stored_form()

    def _check_targets(self) -> None:
        if self.target_parameters:
            raise ValueError(
                f"target_parameters={self.target_parameters!r} cannot be pruned: masks are put on modules, and these "
                "are parameters of a module that does more than multiply by them (experts of a mixture, for instance). "
                "Use target_modules to prune the other layers."
            )
        if self.layers_pattern and self.layers_to_transform is None:
            raise ValueError(
                f"layers_pattern={self.layers_pattern!r} has no effect without `layers_to_transform`. Give both."
            )
        for name in ("layers_to_transform", "layers_pattern"):
            if getattr(self, name) is not None and isinstance(self.target_modules, str):
                raise ValueError(
                    f"{name}={getattr(self, name)!r} cannot be combined with target_modules as a string "
                    f"({self.target_modules!r}). Put the layers into the regular expression, or give a list."
                )

    def _refuse_sparsity(self, density: Optional[float], why: str) -> None:
        """For methods that find the sparsity: 0 until it is known, and never given."""
        asked = density is not None and not isinstance(density, _Derived)
        if not self.finalized and (asked or self.sparsity not in (None, 0.0)):
            given = f"density={density!r}" if asked else f"sparsity={self.sparsity!r}"
            raise ValueError(f"{given} cannot be asked for here: {why}")
        if self.sparsity is None:
            self.sparsity = 0.0

    def _resolve_sparsity(self, density: Optional[float]) -> None:
        if isinstance(density, _Derived) and self.sparsity is not None:
            density = None  # dataclasses.replace hands on what it read
        if density is not None:
            if self.sparsity is not None:
                raise ValueError(f"Give sparsity={self.sparsity!r} or density={density!r}, not both.")
            _check_number("density", density, 0.0, 1.0, "It is the share of weights kept, e.g. density=0.1.")
            if density == 0:
                raise ValueError("density=0 would remove every weight. Use a positive density, e.g. density=0.1.")
            self.sparsity = 1.0 - density
        pattern = None if self.granularity == "head" else parse_granularity(self.granularity)
        if isinstance(pattern, NMGranularity):
            reached = 1.0 - pattern.density
            if self.sparsity is not None and abs(self.sparsity - reached) > 1e-9:
                raise ValueError(
                    f"sparsity={self.sparsity!r} cannot be reached with granularity={self.granularity!r}, which "
                    f"removes exactly {reached:g}. Leave sparsity out, or use another pattern."
                )
            self.sparsity = reached
        if self.sparsity is None:
            self.sparsity = DEFAULT_SPARSITY
        fix = "It is the share of weights removed, e.g. sparsity=0.9."
        _check_number("sparsity", self.sparsity, 0.0, 1.0, fix, open_high=True)
        if not isinstance(self.sparsity_pattern or {}, dict):
            raise ValueError(
                f"sparsity_pattern={self.sparsity_pattern!r} must be a dict of sparsities by module name, such as "
                "{'query': 0.5}."
            )
        for key, value in (self.sparsity_pattern or {}).items():
            try:
                re.compile(key)
            except (re.error, TypeError) as error:
                raise ValueError(
                    f"sparsity_pattern: {key!r} is no module name or regular expression ({error})."
                ) from error
            _check_number(f"sparsity_pattern[{key!r}]", value, 0.0, 1.0, fix, open_high=True)

    def _check_allocation(self) -> None:
        _check_choice("allocation", self.allocation, ALLOCATIONS)
        if (
            isinstance(self.granularity, str)
            and ":" in self.granularity
            and (self.allocation != "local" or self.sparsity_pattern)
        ):
            raise ValueError(
                f"granularity={self.granularity!r} fixes the density of every matrix, so allocation="
                f"{self.allocation!r} and sparsity_pattern={self.sparsity_pattern!r} must stay at their defaults."
            )
        if self.allocation_temperature is not None:
            _check_number("allocation_temperature", self.allocation_temperature, 1e-6, 1e6, "Try 1.")

    def _check_schedule(self) -> None:
        _check_choice("sparsity_schedule", self.sparsity_schedule, tuple(CURVES))
        _check_choice("penalty_schedule", self.penalty_schedule, tuple(CURVES))
        _check_number(
            "initial_sparsity", self.initial_sparsity, 0.0, float(self.sparsity or 0), "It cannot exceed `sparsity`."
        )
        _check_number("schedule_start", self.schedule_start, 0.0, 1.0, "It is a share of training.", open_high=True)
        _check_number("schedule_end", self.schedule_end, 0.0, 1.0, "It is a share of training.")
        if self.schedule_end <= self.schedule_start:
            raise ValueError(
                f"schedule_end={self.schedule_end!r} must come after schedule_start={self.schedule_start!r}; for a "
                "sudden change use sparsity_schedule='constant'."
            )
        if self.total_steps is not None and (not isinstance(self.total_steps, int) or self.total_steps < 1):
            raise ValueError(f"total_steps={self.total_steps!r} must be a positive number of optimizer steps.")

    def _check_training(self) -> None:
        if isinstance(self.score_init, bool) or not isinstance(self.score_init, (int, float)):
            _check_choice("score_init", self.score_init, SCORE_INITS)
        _check_number("penalty", self.penalty, 0.0, 1e9, "Use 0 for no penalty.")
        _check_number("score_lr", self.score_lr, 0.0, 1e3, "The paper uses 2e-2.")
        for name in ("score_rank", "mask_interval"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{name}={value!r} must be a whole number, 1 or more.")
        if self.score == "low_rank" and self.score_init == "random":
            raise ValueError(
                "score_init='random' cannot be combined with score='low_rank', which computes where scores start each "
                "time anew. Use 'magnitude', 'zeros' or a number."
            )

    def _check_stored_form(self) -> None:
        if self.mask_format not in READABLE:
            raise ValueError(
                f"mask_format={self.mask_format!r} is not known to this version of peft_prune, which reads "
                f"{' and '.join(map(str, READABLE))}. "
                "Upgrade it: `pip install -U peft_prune`."
            )
        if self.finalized and not self.mask_info:
            raise ValueError("finalized=True without `mask_info`: the adapter's config is incomplete. Save it again.")
        for name, info in (self.mask_info or {}).items():
            if not is_mask_info(info):
                raise ValueError(
                    f"mask_info[{name!r}]={info!r} must be a dict of shape (two positive numbers), kept (at most as "
                    "many weights), bytes (no more than the packed mask) and crc32 (text): the adapter's config is "
                    "damaged. Download or save it again."
                )

    def save_pretrained(self, save_directory: str, **kwargs: Any) -> None:
        """Save as PEFT does, and let the README.md that PEFT put there say how to load the adapter."""
        super().save_pretrained(save_directory, **kwargs)
        folder = Path(save_directory)
        # an adapter that is not called "default" is saved below the folder that holds the README.md
        has_own = (folder / "README.md").exists()
        add_loading_instructions(folder if has_own else folder.parent, self)

    def sparsity_schedule_for(self, target: float) -> Schedule:
        """Schedule of the sparsity of a module whose final sparsity is `target`."""
        initial = min(self.initial_sparsity, target)
        return Schedule(initial, target, self.schedule_start, self.schedule_end, self.sparsity_schedule)

    def score_threshold_at(self, step: int, total_steps: int) -> Optional[float]:
        """Score above which weights are kept, `None` if a share of them is kept instead."""
        return None

    @property
    def structured(self) -> bool:
        """Whether whole heads or neurons may go, so that merging makes the model smaller."""
        return self.granularity in ("head", "column", "row")

    @property
    def learns_scores(self) -> bool:
        """Whether scores are trained."""
        return self.trains

    @property
    def needs_weights(self) -> bool:
        """Whether masks follow from the base weights, and not from scores alone."""
        return self.from_existing_zeros or not self.learns_scores or self.score == "low_rank"

    @property
    def temperature(self) -> float:
        """Temperature of `allocation="score"` in force (SMP, section 4.1: 1, and 3 or 4 from a density of 0.5 on)."""
        if self.allocation_temperature is not None:
            return self.allocation_temperature
        return 3.0 if self.sparsity is not None and self.sparsity <= 0.5 else 1.0


# `density` is only another way to give the sparsity; reading it back derives it, so that the two cannot disagree.
setattr(PruningConfig, "density", property(lambda self: _Derived(1.0 - self.sparsity)))  # noqa: B010
