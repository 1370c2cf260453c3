"""Is this the base model that a mask was made for?"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..masks.codec import MaskFormatError
from ..masks.fingerprint import agrees
from .layer import PruningLayer
from .watch import warn_once


def check_base_weights(info: Mapping[str, Mapping[str, Any]], targets: Mapping[str, PruningLayer]) -> None:
    """Compare samples of the base weights with those taken when the masks became final.

    Args:
        info: the config's `mask_info`.
        targets: the layers by module name.

    Raises:
        MaskFormatError: a weight is another one; the message names the first such matrix, and how to load the mask all
            the same.
    """
    unknown = []
    for name, layer in targets.items():
        stored = info[name].get("weights")
        if stored is None:
            continue  # a file of version 1
        # a merged layer shows the pruned weight
        same = None if layer.merged else agrees(layer.matrix, stored)
        if same is None:
            unknown.append(name)
        elif not same:
            raise MaskFormatError(
                f"The weights of {name!r} are not those that the adapter's mask was made for: this is another base "
                "model, or another revision or fine-tuned copy of it. Load the base model that adapter_config.json "
                "names. To use the mask on this one all the same: config = PeftConfig.from_pretrained(...); "
                "config.check_base = False; PeftModel.from_pretrained(model, ..., config=config)."
            )
    if unknown:
        warn_once(
            "base",
            f"Whether the base model is the one that the masks were made for cannot be checked for {len(unknown)} "
            f"modules (for instance {unknown[0]!r}): their weights are merged, quantised or offloaded.",
        )
