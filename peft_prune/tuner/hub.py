"""Keeps the adapter's README.md when an adapter is pushed.

`push_to_hub` of Transformers' mixin saves the adapter and then overwrites README.md with a card of its own template,
for LoRA too. With a pruning method that card lacks the one thing a reader must know: to import this package.
"""

from __future__ import annotations

import os
from typing import Any

from peft import PeftModel

from ..config import PruningConfig
from ..model_card import add_loading_instructions
from ..peft_api import replace_method


def keep_card_on_push() -> None:
    """Have a pruned `PeftModel` write its card again before it is uploaded; other models are not touched."""

    def make(original: Any) -> Any:
        def upload(self: Any, working_dir: str | os.PathLike, *args: Any, **kwargs: Any) -> Any:
            config = next((c for c in self.peft_config.values() if isinstance(c, PruningConfig)), None)
            if config is not None:
                self.create_or_update_model_card(str(working_dir))
                add_loading_instructions(working_dir, config)
            return original(self, working_dir, *args, **kwargs)

        return upload

    replace_method(PeftModel, "_upload_modified_files", make)
