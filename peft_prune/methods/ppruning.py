"""P-pruning (Wang et al., LREC-COLING 2024): heads and neurons are removed before fine-tuning, seen on inputs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from peft.utils import PeftType
from torch import nn

from ..calibrated_config import CalibratedConfig
from ..config import FIELDS_OF_ALL, reads_old_files
from ..config_checks import check_choice, check_number, check_whole
from ..importance.similarity import Similarity
from ..layers.layer import PruningLayer
from ..layers.linear import LAYER_CLASSES
from ..peft_api import ALL_LINEAR, ModulesToSaveWrapper
from ..recipe import Moment, Recipe
from ..rules.budget import Budget
from ..selection.granularity import BlockGranularity, Granularity
from ..structure.clustering import LINKAGES, MATCHINGS
from ..structure.sites import find_sites
from ..tuner.model import PruningModel
from ..tuner.registration import register_method
from ..updates.base import Keep


CRITERIA = ("similarity", "magnitude", "random")


@reads_old_files(*FIELDS_OF_ALL)
@dataclass
class PPruningConfig(CalibratedConfig):
    """
    Configuration of P-pruning (Wang et al. 2024), which removes attention heads and feed-forward neurons that do what
    others do already, seen on inputs of the task. Nothing is trained: get the model, then call
    [`peft_prune.calibrate`] once. Fine-tune the smaller model that `merge_and_unload()` returns.

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
    granularity = "column"  # heads and neurons are columns of a matrix

    def __post_init__(self, density=None):
        self._refuse_sparsity(
            density,
            "P-pruning is told the share of the FLOPs that stays, for instance keep_ratio=0.5, and finds the sparsity.",
        )
        super().__post_init__(density)
        self.peft_type = PeftType("PPRUNING")
        check_number("keep_ratio", self.keep_ratio, 1e-9, 1.0, "It is the share of the FLOPs that stays, e.g. 0.5.")
        check_number("lambda_ffn", self.lambda_ffn, 0.0, 1e9, "The paper uses 5.")
        check_choice("head_similarity", self.head_similarity, MATCHINGS)
        check_choice("linkage", self.linkage, LINKAGES)
        check_choice("criterion", self.criterion, CRITERIA)
        for name in ("sequence_length", "num_samples", "num_tokens"):
            check_whole(name, getattr(self, name), 1)

    def recipe(self) -> Recipe:
        """Similarity of activations; a FLOPs budget; weights are left as they are; at calibration."""
        return Recipe(
            Similarity(self.criterion, self.head_similarity, self.linkage, self.seed, self.num_tokens),
            Budget(self.keep_ratio, self.lambda_ffn, self.sequence_length),
            Keep(),
            Moment.CALIBRATION,
        )


class PPruningModel(PruningModel):
    """
    P-pruning: removes heads and neurons before fine-tuning, without labels and without training.

    The mask of a removed head or neuron is on its columns of the output projection or of the second feed-forward
    matrix; `merge_and_unload()` takes its rows out of the other matrices, too.

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
    layer_classes = LAYER_CLASSES  # heads and neurons end in linear layers
    quantized_layer_class = None  # and go for good

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        model = args[0] if args else kwargs["model"]
        self._were_trainable = [p for p in model.parameters() if p.requires_grad]
        super().__init__(*args, **kwargs)

    def merge_and_unload(self, *args: Any, **kwargs: Any) -> nn.Module:
        """As for every method, see [`PruningModel.merge_and_unload`]; and the model can be trained as before.

        PEFT freezes the base model, for good. But a model is pruned by this method in order to fine-tune what is left.
        """
        for parameter in self._were_trainable:
            parameter.requires_grad_(True)
        # of an adapter that was loaded, the copies that take the place of the classifier and the like are frozen
        wrappers = {n: m for n, m in self.model.named_modules() if isinstance(m, ModulesToSaveWrapper)}
        trainable = [
            f"{name}.{key}"
            for name, wrapper in wrappers.items()
            for key, parameter in wrapper.original_module.named_parameters()
            if parameter.requires_grad
        ]
        model = super().merge_and_unload(*args, **kwargs)
        for name in trainable:
            model.get_parameter(name).requires_grad_(True)
        return model

    def _prepare_adapter_config(self, peft_config: Any, model_config: dict) -> Any:
        targets = peft_config.target_modules
        # "all-linear" is all there is to prune here
        if targets is None or isinstance(targets, str) and targets.lower() == ALL_LINEAR:
            # below the block, so that `layers_to_transform` applies
            peft_config.target_modules = {site.output.removeprefix(site.block + ".") for site in find_sites(self.model)}
        return peft_config

    def _prepare_model(self, peft_config: Any, model: nn.Module) -> None:
        self._sites = find_sites(model)
        outputs = {site.output for site in self._sites}
        others = [name for name in self._find_targets(peft_config, model) if name not in outputs]
        if others:
            raise ValueError(
                f"target_modules: {others[0]!r} ({len(others)} such modules) is not where heads or neurons end, which "
                f"is all that P-pruning can remove. Take it out; {sorted(outputs)[0]!r} is one that can be pruned."
            )
        super()._prepare_model(peft_config, model)

    def _granularities(self, config: Any, targets: Mapping[str, PruningLayer]) -> dict[str, Granularity]:
        """The columns of one head or neuron, for each module."""
        by_output = {site.output: site for site in self._sites}
        self._granularity = {name: BlockGranularity(0, by_output[name].width) for name in targets}
        return self._granularity

    def _create_and_replace(  # type: ignore[override]
        self, peft_config: Any, adapter_name: str, target: nn.Module, target_name: str, parent: nn.Module,
        current_key: str, **optional_kwargs: Any,
    ) -> None:  # fmt: skip
        super()._create_and_replace(
            peft_config, adapter_name, target, target_name, parent, current_key, **optional_kwargs
        )
        if not peft_config.init_weights and not peft_config.finalized:
            site = next(site for site in self._sites if site.output == current_key)
            layer = cast(PruningLayer, getattr(parent, target_name))
            layer.start_bits(adapter_name, _random_columns(layer.shape, site.columns, peft_config.keep_ratio))


def _random_columns(shape: tuple[int, int], units: torch.Tensor, keep_ratio: float) -> torch.Tensor:
    """A mask (bool, shape (out, in)) that keeps a random choice of units: at least one, and if there are two, not all.

    Args:
        shape (`tuple[int, int]`): (out, in).
        units (`torch.Tensor`): int64, shape (units, columns of a unit).
        keep_ratio (`float`): share of the units that stays.
    """
    count = max(1, min(round(keep_ratio * len(units)), len(units) - 1))
    columns = torch.zeros(shape[1], dtype=torch.bool)
    columns[units[torch.randperm(len(units))[:count]].flatten()] = True
    return columns.expand(shape)


register_method(name="ppruning", config_cls=PPruningConfig, model_cls=PPruningModel)
