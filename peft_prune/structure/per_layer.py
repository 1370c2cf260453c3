"""Heads and neurons of each layer in the form of Transformers' `per_layer_config`, which no modelling code reads yet.

In `config.json` under its own name that field would hide the sizes of the whole model, and nothing could load it, so it
is written beside our record under another one. Once Transformers builds layers by it, the text only has to move.
"""

from __future__ import annotations

import re
from typing import Any

from .anatomy import anatomy_of
from .fields import fields_of
from .record import FIELD, read_record


PER_LAYER = "peft_prune_per_layer_config"  # of the model's config.json


def per_layer_config(config: Any) -> dict[str, dict[str, int]]:
    """What each layer of a compact model has instead of the sizes in its config; read from the record alone.

    Args:
        config (`PretrainedConfig`): a compact model's.

    Returns:
        `dict[str, dict[str, int]]`: by the number of the layer, such as `{"0": {"num_attention_heads": 6,
        "num_key_value_heads": 2, "intermediate_size": 1000}}`. Empty where an architecture's config has no fields for
        the number and the width of heads, and for models in which all layers are whole.
    """
    fields = fields_of(config.model_type)
    if fields.heads is None or fields.groups is None:
        return {}
    block = anatomy_of(config.model_type)[0]
    attention, network = block.attentions[0].output, block.feed_forwards[0].down
    each = getattr(config, fields.heads) // getattr(config, fields.groups)
    found: dict[str, dict[str, int]] = {}
    for key, entry in (getattr(config, FIELD, None) or {}).items():
        place = re.fullmatch(re.escape(block.name).replace(r"\*", r"(\d+)") + r"\.(.+)", key)
        if place is None:  # the record of removed layers, whose number is in the config
            continue
        left, layer = len(read_record(entry)), found.setdefault(place[1], {})
        if place[2] == attention:
            layer |= {fields.heads: left * each, fields.groups: left}
        elif place[2] == network:
            layer[fields.neurons] = left
    return found
