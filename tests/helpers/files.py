"""Folders of adapters and compact models, and changes to what is in them."""

import json

from helpers.architectures import zero_some
from helpers.models import make_bert
from peft_prune import save_compact, shrink


def compact(folder, **kwargs):
    model = make_bert()
    zero_some(model)
    save_compact(shrink(model), folder, **kwargs)
    return model


def edit(folder, change, name="adapter_config.json"):
    path = folder / name
    config = json.loads(path.read_text())
    change(config)
    path.write_text(json.dumps(config))
