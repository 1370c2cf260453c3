"""The tuner of movement pruning: nothing but its name, since the base trains scores and weights as a config asks."""

from ..model import PruningModel


class MovementPruningModel(PruningModel):
    """
    Movement pruning: learns which weights to keep while it fine-tunes them.

    Args:
        model ([`~transformers.PreTrainedModel`]): the model to prune.
        config ([`MovementPruningConfig`]): the configuration.
        adapter_name (`str`): name of the adapter, `"default"` by default.

    Example:

        ```py
        >>> from transformers import AutoModelForSequenceClassification
        >>> from peft import get_peft_model
        >>> from peft_prune import MovementPruningConfig

        >>> base_model = AutoModelForSequenceClassification.from_pretrained("bert-base-uncased")
        >>> model = get_peft_model(base_model, MovementPruningConfig(variant="hard", sparsity=0.9))
        ```
    """

    prefix = "movement_"
