"""Configuration of P-pruning."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from peft.utils import PeftType

from ...config import PruningConfig
from ...config_checks import check_choice, check_number, check_whole
from ...structure.clustering import LINKAGES, MATCHINGS


CRITERIA = ("similarity", "magnitude", "random")


@dataclass
class PPruningConfig(PruningConfig):
    """
    Configuration of P-pruning (Wang et al. 2024), which removes attention heads and feed-forward neurons that do what
    others do already, seen on inputs of the task. Nothing is trained: get the model, then call
    [`peft_prune.calibrate`] once. Fine-tune the smaller model that `merge_and_unload()` returns.

    Of the fields of [`PruningConfig`], those about sparsity, schedule, penalty and scores have no meaning here.

    Args:
        keep_ratio (`float`):
            Share of the FLOPs of attentions and feed-forward networks that stays, in (0, 1].
        lambda_ffn (`float`):
            λ: how much more is taken from neurons than from heads.
        sequence_length (`int`):
            Tokens of the sequence that FLOPs are counted for.
        num_samples (`int`):
            Number of examples that `calibrate` looks at.
        num_tokens (`int`):
            Number of tokens among them whose activations are compared.
        head_similarity (`str`):
            How dimensions of two heads are matched: `"assignment"` (the best way) or `"greedy"` (the paper's).
        linkage (`str`):
            `"complete"` (the paper's), `"average"` or `"single"`.
        init_weights (`bool`):
            If `False`, a random choice of heads and neurons is in force until `calibrate` makes its own. For tests.
        criterion (`str`):
            `"similarity"` (the paper's), or as baselines `"magnitude"` (units with the smallest weights go) or
            `"random"`.
        seed (`int`):
            Seed of the sample of tokens, and of `criterion="random"`.

    Example:

        ```py
        >>> from peft_prune import PPruningConfig

        >>> config = PPruningConfig(task_type="SEQ_CLS", keep_ratio=0.5)
        ```
    """

    keep_ratio: float = field(default=0.5, metadata={"help": "Share of the FLOPs that stays, in (0, 1]."})
    lambda_ffn: float = field(default=5.0, metadata={"help": "How much more is taken from neurons than from heads."})
    sequence_length: int = field(default=128, metadata={"help": "Tokens of the sequence that FLOPs are counted for."})
    num_samples: int = field(default=3000, metadata={"help": "Examples that calibration looks at."})
    num_tokens: int = field(default=200, metadata={"help": "Tokens whose activations are compared."})
    head_similarity: str = field(default="assignment", metadata={"help": "'assignment' or 'greedy' (the paper's)."})
    linkage: str = field(default="complete", metadata={"help": "'complete', 'average' or 'single'."})
    criterion: str = field(default="similarity", metadata={"help": "'similarity', 'magnitude' or 'random'."})
    seed: int = field(default=0, metadata={"help": "Seed of the sample of tokens."})
    granularity: str = field(default="column", metadata={"help": "Heads and neurons are columns of a matrix."})

    trains: ClassVar[bool] = False
    without_mask: ClassVar[str] = (
        "This P-pruning adapter has not been calibrated, so it prunes nothing yet. Call peft_prune.calibrate(model, "
        "dataloader) first."
    )

    def __post_init__(self, density=None):
        self._refuse_sparsity(
            density,
            "P-pruning is told the share of the FLOPs that stays, for instance keep_ratio=0.5, and finds the sparsity.",
        )
        super().__post_init__(density)
        self.peft_type = PeftType("PPRUNING")
        if self.granularity != "column":
            raise ValueError(
                f"granularity={self.granularity!r}: P-pruning removes whole heads and neurons. Leave it out."
            )
        check_number("keep_ratio", self.keep_ratio, 1e-9, 1.0, "It is the share of the FLOPs that stays, e.g. 0.5.")
        check_number("lambda_ffn", self.lambda_ffn, 0.0, 1e9, "The paper uses 5.")
        check_choice("head_similarity", self.head_similarity, MATCHINGS)
        check_choice("linkage", self.linkage, LINKAGES)
        check_choice("criterion", self.criterion, CRITERIA)
        for name in ("sequence_length", "num_samples", "num_tokens"):
            check_whole(name, getattr(self, name), 1)
        check_whole("seed", self.seed, 0)
