"""The SMP tuner: nothing but its name, since frozen weights under a learned mask are what the base offers."""

from ..model import PruningModel


class SMPModel(PruningModel):
    """
    Static Model Pruning: adapts a frozen model by choosing which weights to keep.

    Args:
        model ([`~transformers.PreTrainedModel`]): the model to prune.
        config ([`SMPConfig`]): the configuration.
        adapter_name (`str`): name of the adapter, `"default"` by default.

    Example:

        ```py
        >>> from transformers import AutoModelForSequenceClassification
        >>> from peft import get_peft_model
        >>> from peft_prune import SMPConfig

        >>> base_model = AutoModelForSequenceClassification.from_pretrained("bert-base-uncased")
        >>> model = get_peft_model(base_model, SMPConfig(task_type="SEQ_CLS", sparsity=0.9))
        ```
    """

    prefix = "smp_"
