"""The configuration that all pruning methods share."""

from __future__ import annotations

import math
from dataclasses import InitVar, dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Optional, Union

from peft import PeftConfig

from .config_checks import (
    check_allocation,
    check_names,
    check_number,
    check_schedule,
    check_sparsity_pattern,
    check_stored_form,
    check_targets,
    check_training,
    check_verbalizer,
)
from .config_record import check_config, checksums_for
from .masks.codec import VERSION
from .masks.granularity import NMGranularity, parse_granularity
from .masks.schedule import Schedule
from .model_card import add_loading_instructions


DEFAULT_SPARSITY = 0.5


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
        check_tensors (`bool`):
            Whether loading compares tensors and config with their checksums, and rejects NaN. Set it to `False` in
            `adapter_config.json` if you edited the files on purpose.
        checksums (`dict`, *optional*):
            Checksums of the config and of the tensors that are no masks. Written by `save_pretrained`.
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
    finds_sparsity: ClassVar[bool] = False  # whether it comes out of training, instead of being given
    # at least this share of each matrix stays when scores are compared with a threshold
    min_density: ClassVar[float] = 0.0
    value_dtype: ClassVar[str] = "float32"
    # where scores come from: "low_rank" if they are held as factors
    score: ClassVar[Optional[str]] = "movement"
    # sparsity of a training checkpoint, for its README.md: known once a model has been saved, and no part of the file
    sparsity_when_saved: ClassVar[Optional[float]] = None
    from_existing_zeros: ClassVar[bool] = False
    # records of what the tuner handed out last, until the config is saved; empty if out of reach
    tensors_when_saved: ClassVar[Optional[dict[str, Any]]] = None

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
        check_allocation(self)
        check_schedule(self)
        check_training(self)
        check_stored_form(self)
        check_verbalizer(self.verbalizer)
        for name in ("total_steps", "score_rank", "mask_interval"):
            if getattr(self, name) is not None:
                setattr(self, name, int(getattr(self, name)))  # NumPy's whole numbers are none to JSON
        check_config(self)

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
            check_number("density", density, 0.0, 1.0, "It is the share of weights kept, e.g. density=0.1.")
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
        check_number("sparsity", self.sparsity, 0.0, 1.0, fix, open_high=True)
        check_sparsity_pattern(self.sparsity_pattern, fix)

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

    def sparsity_schedule_for(self, target: float) -> Schedule:
        """Schedule of the sparsity of a module whose final sparsity is `target`."""
        initial = min(self.initial_sparsity, target)
        return Schedule(initial, target, self.schedule_start, self.schedule_end, self.sparsity_schedule)

    def final_step(self, total_steps: int) -> int:
        """Optimizer step from which on the sparsity is the final one; masks are made anew at some steps only."""
        end = self.schedule_start if self.sparsity_schedule == "constant" else self.schedule_end
        step = math.ceil(end * total_steps)
        step -= (step - 1) / total_steps >= end  # as the schedule counts, which divides
        return min(total_steps, math.ceil(step / self.mask_interval) * self.mask_interval)

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
