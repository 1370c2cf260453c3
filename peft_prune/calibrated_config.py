"""The configuration of methods whose masks are found at calibration, without training."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Optional

from .config import PruningConfig
from .config_checks import (
    check_choice,
    check_flag,
    check_number,
    check_single_weights,
    check_sparsity_pattern,
    check_whole,
)
from .solvers.outliers import check_owl
from .storage.values import VALUE_DTYPES
from .structure.shapes import SHAPES, Shapes
from .updates.base import Keep, Update
from .updates.low_rank import LowRank
from .updates.rewrite import Repair


@dataclass
class CalibratedConfig(PruningConfig):
    """
    Fields of methods that look at inputs, in addition to those of [`PruningConfig`].

    Args:
        num_samples (`int`): number of examples that [`peft_prune.calibrate`] uses.
        seed (`int`): seed of what is drawn at random.

    Raises:
        ValueError: a field is out of range or contradicts another one; the message names field, value and fix.
    """

    num_samples: int = field(default=128, metadata={"help": "Number of calibration examples."})
    seed: int = field(default=0, metadata={"help": "Seed of what is drawn at random."})

    def __post_init__(self, density: Optional[float] = None):
        super().__post_init__(density)
        check_whole("num_samples", self.num_samples, 1)
        check_whole("seed", self.seed, 0)


@dataclass
class OneShotConfig(CalibratedConfig):
    """
    Fields of methods that prune weights layer by layer, in addition to those of [`CalibratedConfig`].

    Args:
        granularity (`str`): `"weight"`, or an n:m pattern such as `"2:4"`: n of every m weights along the input.
        sparsity_pattern (`dict[str, float]`, *optional*): sparsity of single modules, by name or regular expression.
        allocation (`str`):
            `"local"`: all matrices have the same sparsity. `"owl"`: blocks with more outliers, weights whose
            `|W|·‖x‖` is far above the block's mean, keep more (OWL, arXiv 2310.05175); this needs an extra pass of the
            dense model.
        update (`str`):
            `"low_rank"` adds a LoRA beside the mask. It is initialised in closed form to repair part of the damage
            (SLiM, arXiv 2410.09615; QERA, arXiv 2410.06040) and can be trained afterwards. `"none"` adds nothing.
        r (`int`): rank of `update="low_rank"`.
        lora_alpha (`float`): α of `update="low_rank"`, which is scaled by `lora_alpha / r`.

    Raises:
        ValueError: a field is out of range or contradicts another one; the message names field, value and fix.
    """

    granularity: str = field(default="weight", metadata={"help": "'weight', or n:m such as '2:4'."})
    sparsity_pattern: Optional[dict[str, float]] = field(
        default_factory=dict, metadata={"help": "Sparsity of single modules, by name or regular expression."}
    )
    allocation: str = field(default="local", metadata={"help": "'local', or 'owl': by outliers of blocks."})
    update: str = field(default="none", metadata={"help": "'none' or 'low_rank'."})
    r: int = field(default=8, metadata={"help": "Rank of update='low_rank'."})
    lora_alpha: float = field(default=8.0, metadata={"help": "update='low_rank' is scaled by lora_alpha / r."})

    def __post_init__(self, density: Optional[float] = None):
        super().__post_init__(density)
        check_single_weights(self.granularity)
        check_choice("allocation", self.allocation, ("local", "owl"))
        check_choice("update", self.update, ("none", "low_rank"))
        check_whole("r", self.r, 1)
        check_number("lora_alpha", self.lora_alpha, 1e-9, 1e9, "LoRA's usual choice is r or 2r.")
        check_sparsity_pattern(self.sparsity_pattern, "It is the share of weights removed, e.g. sparsity=0.5.")
        for name, default in (("sparsity_pattern", {}), ("allocation", "local")):
            if ":" in self.granularity and getattr(self, name) != default:
                raise ValueError(
                    f"granularity={self.granularity!r} fixes the sparsity of every matrix, so {name}="
                    f"{getattr(self, name)!r} must stay at its default."
                )
        if self.allocation == "owl" and self.sparsity is not None and not self.finalized:
            check_owl(self.sparsity)

    def beside_mask(self) -> Optional[LowRank]:
        """The update beside the mask, if there is one."""
        return LowRank(self.r, self.lora_alpha, seed=self.seed) if self.update == "low_rank" else None


@dataclass
class UnitsConfig(CalibratedConfig):
    """
    Fields of methods that remove heads and neurons, in addition to those of [`CalibratedConfig`].

    Args:
        keep_ratio (`float`): share of the cost of attentions and feed-forward networks to keep, in (0, 1].
        sequence_length (`int`): tokens of the sequence that FLOPs are counted for.
        shapes (`str`):
            `"free"`: each layer keeps as many heads and neurons as their importance says. `"uniform"`: all layers keep
            as many, so that [`peft_prune.save_standard`] writes a model that Transformers loads by itself.
        multiple_of (`int`): the neurons that a layer keeps are a multiple of it, such as 64 for tensor cores.
        min_share (`float`): share of the heads and of the neurons of each layer that is always kept; at least one.
        repair (`bool`):
            Whether the kept weights are adjusted to compensate for the removed ones, by least squares on the
            calibration data. The adapter then holds new values, not only a mask.
        damping (`float`):
            How strongly repaired weights are pulled towards the old ones, as a share of the mean squared input.
        value_dtype (`str`):
            How repaired weights are stored: `"float32"`, `"float16"`, `"bfloat16"`, or `"int8"` with a scale for each
            row.

    Raises:
        ValueError: a field is out of range or contradicts another one; the message names field, value and fix.
    """

    keep_ratio: float = field(default=0.5, metadata={"help": "Share of the cost to keep, in (0, 1]."})
    sequence_length: int = field(default=128, metadata={"help": "Tokens of the sequence that FLOPs are counted for."})
    min_share: float = field(default=0.0, metadata={"help": "Share of the units of each layer that is always kept."})
    repair: bool = field(default=False, metadata={"help": "Whether kept weights compensate for removed ones."})
    damping: float = field(default=0.01, metadata={"help": "Of the repair, as a share of the mean squared input."})
    value_dtype: str = field(default="float16", metadata={"help": "'float32', 'float16', 'bfloat16' or 'int8'."})
    shapes: str = field(default="free", metadata={"help": "'free', or 'uniform': all layers keep as many."})
    multiple_of: int = field(default=1, metadata={"help": "Neurons of a layer are a multiple of it."})
    granularity = "column"  # heads and neurons are columns of a matrix
    budget = "flops"  # what the cost is

    def __post_init__(self, density: Optional[float] = None):
        self.refuse_sparsity(
            density, "set the share to keep instead, for instance keep_ratio=0.5; the sparsity follows from it."
        )
        super().__post_init__(density)
        what = "FLOPs" if self.budget == "flops" else "parameters"
        check_number("keep_ratio", self.keep_ratio, 1e-9, 1.0, f"It is the share of the {what} that is kept, e.g. 0.5.")
        check_number("damping", self.damping, 1e-9, 1.0, "The papers use 0.01.")
        check_number("min_share", self.min_share, 0.0, 1.0, "It is a share of the units of each layer, e.g. 0.05.")
        check_choice("value_dtype", self.value_dtype, tuple(VALUE_DTYPES))
        check_flag("repair", self.repair)
        if not (self.repair or self.value_dtype == "float16" or self.finalized):
            raise ValueError(
                f"value_dtype={self.value_dtype!r} has no effect with repair=False, which stores no values. Leave it "
                "out, or use repair=True."
            )
        check_whole("sequence_length", self.sequence_length, 1)
        check_choice("shapes", self.shapes, SHAPES)
        check_whole("multiple_of", self.multiple_of, 1)

    def kept_shapes(self) -> Shapes:
        """How many units layers may keep."""
        return Shapes(self.shapes, self.multiple_of)

    def kept_weights(self) -> Update:
        """What happens to the weights that stay."""
        return Repair(self.value_dtype, self.damping) if self.repair else Keep()
