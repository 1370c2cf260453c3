"""Which tensor of a checkpoint is which of the base model."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any, Optional

from torch import nn

from ..tuner.targets import IN_BLOCK


# what compressed-tensors and quantisers store in the place of a weight
_COMPRESSED = re.compile(r"\.(weight_packed|weight_scale|compressed|bitmask|qweight|qzeros|weight\.absmax|SCB)$")
# buffers that old versions of Transformers saved
_OLD_BUFFERS = (r"rotary_emb\.inv_freq$", r"(^|\.)position_ids$", r"\.attn\.masked_bias$")
_ANOTHER_CLASS = "Pass models instead, both loaded with the class of the checkpoint."


class Names:
    """
    Args:
        model (`nn.Module`): the base model.
        stored (`Iterable[str]`): names of the checkpoint's tensors.
        label (`str`): what the checkpoint is called in messages.
    """

    def __init__(self, model: nn.Module, stored: Iterable[str], label: str) -> None:
        self.model, self.label, self.stored = model, label, set(stored)
        self.prefix = getattr(model, "base_model_prefix", "") + "."
        self.used: set[str] = set()
        self._tied: dict[str, list[str]] = {}
        owners: dict[int, list[str]] = {}
        for name, parameter in model.named_parameters(remove_duplicate=False):
            owners.setdefault(id(parameter), []).append(name)
            self._tied[name] = owners[id(parameter)]

    def find(self, name: str) -> Optional[str]:
        """Name in the checkpoint of a tensor of the base model, with or without the head's prefix; or of one that is
        tied to it. `None` if it has none."""
        for candidate in (name, *self._tied.get(name, ())):
            for found in (candidate, candidate.removeprefix(self.prefix), self.prefix + candidate):
                if found in self.stored:
                    self.used.add(found)
                    return found
        return None

    def require(self, name: str) -> str:
        """As [`find`].

        Raises:
            ValueError: the checkpoint has no such tensor.
        """
        found = self.find(name)
        if found is None:
            raise ValueError(
                f"{self.label} holds no {name!r}, which {type(self.model).__name__} has: "
                f"{self._compressed() or f'the architectures differ. {_ANOTHER_CLASS}'}"
            )
        return found

    def _compressed(self) -> str:
        packed = sorted(name for name in self.stored if _COMPRESSED.search(name))
        if not packed:
            return ""
        return (
            f"it is compressed or quantised, and holds {packed[0]!r} instead. Load it with Transformers, which "
            "unpacks it, and pass the model as sparse_model."
        )

    def without_place(self) -> list[str]:
        """Tensors of the checkpoint outside of the model, such as another head's, which are not imported.

        Raises:
            ValueError: one belongs to a part that the model has, or to another block.
        """
        patterns = [*(getattr(self.model, "_keys_to_ignore_on_load_unexpected", None) or ()), *_OLD_BUFFERS]
        ignored: Any = re.compile("|".join(f"({pattern})" for pattern in patterns))
        left = sorted(name for name in self.stored - self.used if not ignored.search(name))
        parts = {name for name, _ in self.model.named_modules()} - {""}
        for name in left:
            parent = name.rpartition(".")[0]
            if IN_BLOCK.fullmatch(name) or parent in parts or self.prefix + parent in parts:
                raise ValueError(
                    f"{self.label} holds {name!r}, for which {type(self.model).__name__} has no place: "
                    f"{self._compressed() or f'the architectures differ. {_ANOTHER_CLASS}'}"
                )
        return left
