"""What the configs of Transformers call the sizes that pruning changes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Optional


@dataclass(frozen=True)
class Fields:
    """What a config calls the sizes that pruning changes; `None` for what its modelling code takes from elsewhere.

    Attributes:
        neurons (`str`): neurons of a feed-forward network; those of a decoder, where it has two sides, in `decoder`.
        heads, groups, head_dim (`str`, *optional*): query heads, heads of keys and values, width of a head.
        decoder (`str`, *optional*): neurons of the decoder's feed-forward networks.
        divides (`bool`): whether the number of heads has to divide the hidden size.
    """

    neurons: str
    heads: Optional[str] = None
    groups: Optional[str] = None
    head_dim: Optional[str] = None
    decoder: Optional[str] = None
    divides: bool = False


_GROUPED = Fields("intermediate_size", "num_attention_heads", "num_key_value_heads", "head_dim")
_FIELDS: dict[str, Fields] = {
    "llama": Fields("intermediate_size", "num_attention_heads", "num_key_value_heads", "head_dim", divides=True),
    **dict.fromkeys(("mistral", "qwen2", "qwen3", "gemma3_text"), _GROUPED),
    "distilbert": Fields("hidden_dim"),
    "opt": Fields("ffn_dim"),
    "gpt2": Fields("n_inner"),
    "gptj": Fields("n_inner"),
    "bart": Fields("encoder_ffn_dim", decoder="decoder_ffn_dim"),
    "t5": Fields("d_ff"),
}
_OTHERS = Fields("intermediate_size")  # BERT and most others


def fields_of(model_type: str) -> Fields:
    """What the configs of an architecture call these sizes."""
    return _FIELDS.get(model_type, _OTHERS)
