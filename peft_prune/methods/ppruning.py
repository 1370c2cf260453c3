"""P-pruning (Wang et al., LREC-COLING 2024): heads and neurons are removed before fine-tuning, seen on inputs."""

from __future__ import annotations

from dataclasses import dataclass, field

from peft.utils import PeftType

from ..calibrated_config import UnitsConfig
from ..config import FIELDS_OF_ALL, reads_old_files
from ..config_checks import check_choice, check_number, check_whole
from ..importance.similarity import Similarity
from ..recipe import Moment, Recipe
from ..rules.budget import Budget
from ..structure.clustering import LINKAGES, MATCHINGS
from ..tuner.registration import register_method
from ..tuner.units import UnitPruningModel


CRITERIA = ("similarity", "magnitude", "random")


@reads_old_files(*FIELDS_OF_ALL)
@dataclass
class PPruningConfig(UnitsConfig):
    """
    Configuration of P-pruning (Wang et al. 2024), which removes attention heads and feed-forward neurons that behave
    like others on inputs of the task. Nothing is trained: get the model, then call [`peft_prune.calibrate`] once.
    Fine-tune the smaller model that `merge_and_unload()` returns.

    Args:
        keep_ratio (`float`):
            Share of the FLOPs of attentions and feed-forward networks to keep, in (0, 1].
        lambda_ffn (`float`):
            λ: how much more is removed from neurons than from heads.
        sequence_length (`int`):
            Tokens of the sequence that FLOPs are counted for.
        num_samples (`int`):
            Number of examples that `calibrate` uses.
        num_tokens (`int`):
            Number of tokens among them whose activations are compared.
        head_similarity (`str`):
            How dimensions of two heads are matched: `"assignment"` (optimal) or `"greedy"` (the paper's).
        linkage (`str`):
            `"complete"` (the paper's), `"average"` or `"single"`.
        init_weights (`bool`):
            If `False`, a random mask of heads and neurons is used until `calibrate` chooses one. For tests.
        criterion (`str`):
            `"similarity"` (the paper's), or as baselines `"magnitude"` (removes the units with the smallest weights) or
            `"random"`.
        min_share (`float`):
            Share of the heads and of the neurons of each layer that is always kept (not in the paper, where it is 0);
            at least one is.
        seed (`int`):
            Seed of the sample of tokens, and of `criterion="random"`.
        repair (`bool`):
            Whether the kept weights are adjusted to compensate for the removed ones (not in the paper). The adapter
            then holds new values of the matrices that heads and neurons feed, not only a mask.
        damping, value_dtype: of `repair`, see [`StructuredPruningConfig`].

    Example:

        ```py
        >>> from peft_prune import PPruningConfig

        >>> config = PPruningConfig(task_type="SEQ_CLS", keep_ratio=0.5)
        ```
    """

    keep_ratio: float = field(default=0.5, metadata={"help": "Share of the FLOPs to keep, in (0, 1]."})
    lambda_ffn: float = field(default=5.0, metadata={"help": "How much more is removed from neurons than from heads."})
    num_samples: int = field(default=3000, metadata={"help": "Number of calibration examples."})
    num_tokens: int = field(default=200, metadata={"help": "Tokens whose activations are compared."})
    head_similarity: str = field(default="assignment", metadata={"help": "'assignment' or 'greedy' (the paper's)."})
    linkage: str = field(default="complete", metadata={"help": "'complete', 'average' or 'single'."})
    criterion: str = field(default="similarity", metadata={"help": "'similarity', 'magnitude' or 'random'."})
    seed: int = field(default=0, metadata={"help": "Seed of the sample of tokens."})

    def __post_init__(self, density=None):
        super().__post_init__(density)
        self.peft_type = PeftType("PPRUNING")
        check_number("lambda_ffn", self.lambda_ffn, 0.0, 1e9, "The paper uses 5.")
        check_choice("head_similarity", self.head_similarity, MATCHINGS)
        check_choice("linkage", self.linkage, LINKAGES)
        check_choice("criterion", self.criterion, CRITERIA)
        check_whole("num_tokens", self.num_tokens, 1)

    def recipe(self) -> Recipe:
        """Similarity of activations; a FLOPs budget; weights are left as they are, or repaired; at calibration."""
        shapes = self.kept_shapes()
        rule = Budget(self.keep_ratio, self.lambda_ffn, self.sequence_length, min_share=self.min_share, shapes=shapes)
        return Recipe(
            Similarity(self.criterion, self.head_similarity, self.linkage, self.seed, self.num_tokens),
            rule,
            self.kept_weights(),
            Moment.CALIBRATION,
        )


class PPruningModel(UnitPruningModel):
    """
    P-pruning: removes heads and neurons before fine-tuning, without labels and without training.

    Args:
        model ([`~transformers.PreTrainedModel`]): the model to prune.
        config ([`PPruningConfig`]): the configuration.
        adapter_name (`str`): name of the adapter, `"default"` by default.

    Example:

        ```py
        >>> from peft import get_peft_model
        >>> from peft_prune import PPruningConfig, calibrate

        >>> model = get_peft_model(base_model, PPruningConfig(task_type="SEQ_CLS", keep_ratio=0.5))
        >>> calibrate(model, batches)
        >>> smaller = model.merge_and_unload()
        ```
    """

    prefix = "ppruning_"


register_method(name="ppruning", config_cls=PPruningConfig, model_cls=PPruningModel)
