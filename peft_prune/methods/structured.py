"""Heads and neurons chosen by the loss of the output over the whole model; what stays is repaired by least squares."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Optional, Union

from peft.utils import PeftType

from ..calibrated_config import UnitsConfig
from ..config_checks import check_choice, check_number, check_whole
from ..importance.output_loss import CRITERIA as LOSSES
from ..importance.output_loss import OutputLoss
from ..importance.similarity import Similarity
from ..importance.units import UnitImportance
from ..importance.whole_blocks import BlockInfluence, BlockLoss
from ..recipe import Moment, Recipe
from ..rules.budget import AUTO, Budget
from ..rules.whole_layers import WholeLayers
from ..structure.flops import BUDGETS
from ..tuner.registration import register_method
from ..tuner.units import UnitPruningModel


BLOCKS = {"influence": BlockInfluence, "loss": BlockLoss}
CRITERIA = (*LOSSES, "similarity", "magnitude", "random")


@dataclass
class StructuredPruningConfig(UnitsConfig):
    """
    Configuration of structured pruning without training: attention heads (groups of them, where they share keys and
    values) and feed-forward neurons are removed where the output loses least per FLOP or parameter, over the whole
    model, and the kept weights are adjusted to compensate. Get the model, then call [`peft_prune.calibrate`] with
    batches of text; `merge_and_unload()` returns a smaller model.

    Args:
        keep_ratio (`float`):
            Share of the FLOPs (or parameters) of attentions and feed-forward networks to keep, in (0, 1].
        budget (`str`):
            What `keep_ratio` counts: `"flops"` or `"parameters"`.
        criterion (`str`):
            `"loss"`: greedily, the units whose removal costs the output least when the others compensate (Optimal Brain
            Surgeon for groups of columns, as ZipLM and SlimGPT). `"activation"`: each unit by itself, `‖W_j‖·rms(x_j)`.
            Both weight the losses of a layer by how much the model's predictions depend on its output (trace of the
            Fisher information, from one backward pass over 2,048 tokens). As baselines, in equal shares of each layer:
            `"similarity"` (as P-pruning), `"magnitude"` and `"random"`.
        repair (`bool`):
            Whether the kept weights are adjusted to compensate for the removed ones, by least squares on the
            calibration data. The adapter then holds new values of the matrices that heads and neurons feed, not only a
            mask.
        lambda_ffn (`float`, *optional*):
            How much more is removed from neurons than from heads; `None` ranks both in one list. `"auto"` is one list
            for a model that predicts tokens, and 5 for others, such as classifiers: a task that the model is yet to be
            fine-tuned for may need heads that it hardly used before.
        min_share (`float`):
            Share of the heads and of the neurons of each layer that is always kept; at least one is.
        keep_layers (`int`, *optional*):
            Number of layers (blocks) to keep; the others are removed as a whole, never the first. They count towards
            `keep_ratio`: heads and neurons meet the rest of the budget, so `keep_ratio=1.0` removes layers only. For
            models with one stack of blocks and their norms before attention and feed-forward.
        layer_criterion (`str`):
            `"influence"`: the layers that change the direction of hidden states least (ShortGPT). `"loss"`: one layer
            after the other, the one without which the model's answers change least (KL divergence from the dense
            model).
        layer_samples (`int`):
            Number of examples for choosing layers.
        sequence_length (`int`):
            Tokens of the sequence that FLOPs are counted for.
        damping (`float`):
            Share of the mean squared input that is added to all, so that the problem is well posed.
        value_dtype (`str`):
            How repaired weights are stored: `"float32"`, `"float16"`, `"bfloat16"`, or `"int8"` with a scale for each
            row.
        num_samples (`int`):
            Number of examples that `calibrate` uses.
        init_weights (`bool`):
            If `False`, a random mask of heads and neurons is used until `calibrate` chooses one. For tests.
        seed (`int`):
            Seed of `criterion="random"`.

    Example:

        ```py
        >>> from peft_prune import StructuredPruningConfig

        >>> config = StructuredPruningConfig(task_type="CAUSAL_LM", keep_ratio=0.8)
        ```
    """

    keep_ratio: float = field(default=0.8, metadata={"help": "Share of the FLOPs or parameters to keep."})
    budget: str = field(default="flops", metadata={"help": "'flops' or 'parameters'."})
    criterion: str = field(default="loss", metadata={"help": f"One of {', '.join(CRITERIA)}."})
    repair: bool = field(default=True, metadata={"help": "Whether kept weights compensate for removed ones."})
    lambda_ffn: Union[float, str, None] = field(
        default=AUTO, metadata={"help": "How much more is removed from neurons than from heads; None: one list."}
    )
    min_share: float = field(default=0.05, metadata={"help": "Share of the units of each layer that is always kept."})
    sequence_length: int = field(default=512, metadata={"help": "Tokens of the sequence that FLOPs are counted for."})
    keep_layers: Optional[int] = field(default=None, metadata={"help": "Layers that stay; None: all of them."})
    layer_criterion: str = field(
        default="influence", metadata={"help": "How layers are chosen: 'influence' or 'loss'."}
    )
    layer_samples: int = field(default=4, metadata={"help": "Examples that layers are chosen on."})

    def __post_init__(self, density: Optional[float] = None):
        check_choice("budget", self.budget, BUDGETS)
        super().__post_init__(density)
        self.peft_type = PeftType("STRUCTURED")
        check_choice("criterion", self.criterion, CRITERIA)
        if self.lambda_ffn not in (None, AUTO):
            check_number("lambda_ffn", self.lambda_ffn, 0.0, 1e9, f"Use {AUTO!r}, or None for one list.")
        if self.keep_layers is not None:
            check_whole("keep_layers", self.keep_layers, 1)
        check_choice("layer_criterion", self.layer_criterion, tuple(BLOCKS))
        check_whole("layer_samples", self.layer_samples, 1)

    def recipe(self) -> Recipe:
        """The loss of the output; a budget over the model; weights that stay are repaired; at calibration."""
        importance: UnitImportance = Similarity(self.criterion, seed=self.seed)
        if self.criterion in LOSSES:
            importance = OutputLoss(self.criterion, self.repair, self.damping, self.seed)
        layers = None
        if self.keep_layers is not None:
            layers = WholeLayers(self.keep_layers, BLOCKS[self.layer_criterion](), self.layer_samples)
        rule = Budget(
            self.keep_ratio, self.lambda_ffn, self.sequence_length, self.budget, self.min_share, layers,
            self.kept_shapes(),
        )  # fmt: skip
        return Recipe(importance, rule, self.kept_weights(), Moment.CALIBRATION)


class StructuredPruningModel(UnitPruningModel):
    """Heads and neurons removed without training. Configure it with [`StructuredPruningConfig`]."""

    prefix = "structured_"


register_method(name="structured", config_cls=StructuredPruningConfig, model_cls=StructuredPruningModel)
