"""DSEE (Chen et al., ACL 2023, arXiv 2111.00160): a sparse update on a sparse model, pruned while it is trained."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Optional, Union

from peft.utils import PeftType

from .. import doubts
from ..config import FIELDS_OF_ALL, PruningConfig, reads_old_files
from ..config_checks import check_choice, check_number, check_whole
from ..importance.of_update import OfUpdate
from ..matching import is_target
from ..presets import by_preset, check_preset, fill_in
from ..recipe import Moment, Recipe
from ..rules.smallest import Smallest
from ..selection.curve import Schedule, step_at
from ..tuner.registration import register_method
from ..updates.low_rank import LowRank
from ..updates.support import SUPPORTS
from .dsee_model import DSEEModel


IMPORTANCES = ("update", "effective", "weight")
STAGES = 20
# `prune_from` is `prune_at` where it is not named: pruned once
PRESETS: dict[str, dict[str, Any]] = {
    "auto": {"importance": "effective", "prune_from": 0.0, "prune_at": 0.6, "threshold": "matrix"},
    "paper": {"importance": "update", "prune_at": 0.5, "threshold": "model"},
}


@reads_old_files(*(name for name in FIELDS_OF_ALL if name != "total_steps"), preset="paper")
@dataclass
class DSEEConfig(PruningConfig):
    """
    Configuration of DSEE (Chen et al. 2023): `W ⊙ S1 + s·(B·A + S2)`, a low-rank and a sparse update of a model that is
    pruned while they are trained.

    Args:
        preset (`str`):
            What fields are that are left out. `"paper"`: queries and values are updated; half way all is pruned at
            once, `prune_from=prune_at=0.5`, by one threshold, `threshold="model"`, and weights with update by the size
            of that, `importance="update"`. `"auto"`: every matrix that loses single weights is updated; sparsity grows
            from the first step to 60 % of training, `prune_from=0`, `prune_at=0.6`; each matrix loses the same share,
            `threshold="matrix"`, of its weights with their update, `importance="effective"`.
        r (`int`): rank of the low-rank update `BA`.
        lora_alpha (`float`): α; the update is scaled by `s = α / r`.
        lora_dropout (`float`): dropout before the update.
        num_sparse (`int`): number of trained places of each matrix, `S2`; 0 for none.
        support (`str`):
            Where they are: `"grebsmo"` (what no low-rank matrix explains of the weight), `"random"` or `"magnitude"`.
        target_modules (`Union[list[str], str]`, *optional*):
            Modules that are updated. By default as `preset` says; queries and values where no single weights go.
        prune_target_modules (`Union[list[str], str]`, *optional*):
            Modules that are pruned. By default the linear layers inside the numbered blocks.
        sparsity (`float`, *optional*):
            Share of the weights of pruned modules without update that goes, the smallest of all; by default 0.
        update_sparsity (`float`, *optional*):
            The same for pruned modules with update, ranked by `importance`. By default `sparsity`.
        importance (`str`):
            `"update"` (`|s·(BA + S2)|`), `"effective"` (`|W + s·(BA + S2)|`) or `"weight"` (`|W|`).
        heads_to_prune (`int`):
            Heads that go in each layer: those whose queries and values are updated least.
        neuron_sparsity (`float`):
            Share of the neurons of each feed-forward network that goes, the ones with the smallest weights.
        prune_at (`float`):
            Share of training, in (0, 1], at which all this has been pruned; the update is trained on. Heads and neurons
            go then, at once.
        prune_from (`float`):
            Share of training from which on the sparsity of single weights grows on a cubic, in twenty stages that each
            choose anew from all weights. With `prune_at` there is no more than one stage.
        threshold (`str`):
            `"matrix"`: single weights go by a threshold for each matrix, so that all lose the same share. `"model"`: by
            one for all matrices with update, and one for those without.
        keep_sparse (`bool`):
            Whether merging masks the update, too.
        seed (`int`):
            Seed of the support, and of `A`.
        total_steps (`int`, *optional*):
            Number of optimizer steps of the training. `PruningCallback` fills it in.

    Example:

        ```py
        >>> from peft_prune import DSEEConfig

        >>> config = DSEEConfig(task_type="SEQ_CLS", r=16, num_sparse=64, sparsity=0.5)
        ```
    """

    preset: str = field(default="auto", metadata={"help": "'auto' or 'paper'."})
    r: int = field(default=16, metadata={"help": "Rank of the low-rank update."})
    lora_alpha: float = field(default=16.0, metadata={"help": "The update is scaled by lora_alpha / r."})
    lora_dropout: float = field(default=0.0, metadata={"help": "Dropout before the update."})
    num_sparse: int = field(default=64, metadata={"help": "Trained places of each matrix."})
    support: str = field(default="grebsmo", metadata={"help": "'grebsmo', 'random' or 'magnitude'."})
    prune_target_modules: Optional[Union[list[str], str]] = field(
        default=None, metadata={"help": "Modules to prune; by default the linear layers inside the numbered blocks."}
    )
    update_sparsity: Optional[float] = field(default=None, metadata={"help": "Sparsity of modules with update."})
    importance: Optional[str] = by_preset("'update', 'effective' or 'weight'.")
    heads_to_prune: int = field(default=0, metadata={"help": "Heads that go in each layer."})
    neuron_sparsity: float = field(default=0.0, metadata={"help": "Share of the neurons that goes."})
    prune_at: Optional[float] = by_preset("Share of training at which all is pruned.")
    prune_from: Optional[float] = by_preset("Share of training at which sparsity begins to grow.")
    threshold: Optional[str] = by_preset("'matrix' or 'model': where weights compete.")
    keep_sparse: bool = field(default=False, metadata={"help": "Whether merging masks the update, too."})
    seed: int = field(default=0, metadata={"help": "Seed of the support and of A."})

    total_steps: Optional[int] = field(default=None, metadata={"help": "Optimizer steps of the training."})

    def __post_init__(self, density=None):
        if self.sparsity is None and density is None:
            self.sparsity = 0.0
        super().__post_init__(density)
        self.peft_type = PeftType("DSEE")
        check_preset(self, {"paper": None})
        fill_in(self, PRESETS[self.preset])
        check_number("prune_at", self.prune_at, 1e-9, 1.0, "It is a share of training, e.g. 0.5.")
        fill_in(self, {"prune_from": self.prune_at})
        check_number(
            "prune_from", self.prune_from, 0.0, float(self.prune_at or 1.0), "It is a share of training up to prune_at."
        )
        check_choice("threshold", self.threshold, ("matrix", "model"))
        if isinstance(self.prune_target_modules, list):
            self.prune_target_modules = set(self.prune_target_modules)  # type: ignore[assignment]
        check_choice("support", self.support, SUPPORTS)
        check_choice("importance", self.importance, IMPORTANCES)
        for name, least in (("r", 1), ("num_sparse", 0), ("heads_to_prune", 0), ("seed", 0)):
            check_whole(name, getattr(self, name), least)
        check_number("lora_alpha", self.lora_alpha, 0.0, 1e9, "LoRA's usual choice is r or 2r.")
        check_number("lora_dropout", self.lora_dropout, 0.0, 1.0, "Try 0.1.", open_high=True)
        check_number("neuron_sparsity", self.neuron_sparsity, 0.0, 1.0, "The paper uses 0.4.", open_high=True)
        if self.update_sparsity is not None:
            check_number("update_sparsity", self.update_sparsity, 0.0, 1.0, "Try 0.5.", open_high=True)
        if self.total_steps is not None:
            check_whole("total_steps", self.total_steps, 1)

    def to_dict(self) -> dict[str, Any]:
        """As for every config, with sets as lists, for JSON."""
        fields = super().to_dict()
        if isinstance(fields.get("prune_target_modules"), set):
            fields["prune_target_modules"] = sorted(fields["prune_target_modules"])
        return fields

    def prunes(self, module_name: str) -> bool:
        """Whether a module is among those that are pruned."""
        return self.prune_target_modules is not None and bool(is_target(self, module_name, "prune_target_modules"))

    def updates(self, module_name: str) -> bool:
        """Whether a module is among those that are updated."""
        return bool(is_target(self, module_name))

    @property
    def updates_what_it_prunes(self) -> bool:
        """Whether, if nobody says which, all pruned modules are updated, and not queries and values."""
        return self.preset == "auto" and bool(self.sparsity or self.update_sparsity)

    def final_step(self, total_steps: int) -> int:
        """Optimizer step at which all has been pruned."""
        return step_at(float(self.prune_at or 0.0), total_steps)

    def stages(self, total_steps: int) -> dict[int, float]:
        """Optimizer steps at which it is pruned, and the share of the sparsity that is reached at each: 1 at last."""
        first, last = (step_at(float(share or 0.0), total_steps) for share in (self.prune_from, self.prune_at))
        return Schedule(0.0, 1.0, first / total_steps, last / total_steps).stages(total_steps, STAGES)

    def doubts(self, total_steps: int, learning_rate: Optional[float] = None, decays: bool = True) -> list[str]:
        """Too few steps for the sparsity, or after it, or a learning rate that does not suit factors of low rank."""
        sparsity = max(self.sparsity or 0.0, self.update_sparsity or 0.0)
        found = doubts.of_steps(sparsity, total_steps)
        found += doubts.of_rate("learning_rate", learning_rate, doubts.FACTOR_LR, "factors of low rank")
        if len(self.stages(total_steps)) == 1:
            found += doubts.of_pruning_at_once(sparsity, total_steps - self.final_step(total_steps), self.prune_at or 1)
        return found

    def recipe(self) -> Recipe:
        """Sizes with the update; the smallest go, and heads and neurons; low rank and sparse places; at some steps."""
        sparsity = float(self.sparsity or 0)
        update_sparsity = sparsity if self.update_sparsity is None else self.update_sparsity
        return Recipe(
            OfUpdate(str(self.importance)),
            Smallest(
                sparsity, update_sparsity, self.heads_to_prune, self.neuron_sparsity, self.threshold == "matrix"
            ),
            LowRank(
                self.r, self.lora_alpha, self.lora_dropout, self.num_sparse, self.support, self.seed,
                random=not self.init_weights,
            ),
            Moment.ONCE,
        )  # fmt: skip


register_method(name="dsee", config_cls=DSEEConfig, model_cls=DSEEModel)
