"""The adapter's README.md: PEFT writes it, this adds what a reader needs to load a mask."""

from __future__ import annotations

import os
from typing import Any

from huggingface_hub import ModelCard


_HEADING = "## How to Get Started with the Model"
_EMPTY = "[More Information Needed]"


def loading_instructions(config: Any) -> str:
    """Markdown that says what the adapter is and how to load it.

    Args:
        config ([`PruningConfig`]): the adapter's configuration.
    """
    base = config.base_model_name_or_path or "the base model"
    method = getattr(config.peft_type, "value", config.peft_type)
    return (
        f"This adapter prunes {base} to a sparsity of {config.sparsity:.0%} ({method}, granularity "
        f"`{config.granularity}`, allocation `{config.allocation}`). PEFT does not know the method by itself: install "
        "`peft_prune` and import it before loading.\n\n"
        "```python\n"
        f"import peft_prune  # makes PEFT know {method}\n"
        "from peft import PeftModel\n\n"
        'model = PeftModel.from_pretrained(base_model, "this/adapter")\n'
        "```\n"
    )


def add_loading_instructions(folder: str | os.PathLike, config: Any) -> None:
    """Put the instructions into the README.md of a folder, unless it says already to import the package.

    Args:
        folder (`str` or `os.PathLike`): where the adapter was saved; nothing happens if it has no README.md
            of PEFT's.
        config ([`PruningConfig`]): the adapter's configuration.
    """
    path = os.path.join(folder, "README.md")
    if not os.path.isfile(path):
        return
    card = ModelCard.load(path)
    if card.data.library_name != "peft":  # somebody's README.md, not an adapter's
        return
    if "import peft_prune" not in card.text:
        text = loading_instructions(config)
        before, heading, after = card.text.partition(_HEADING)
        if heading:
            section, next_heading, rest = after.partition("\n## ")
            if _EMPTY in section:
                section = section.replace(_EMPTY, text)
            else:
                section = f"{section.rstrip()}\n\n{text}"
            card.text = before + heading + section + next_heading + rest
        else:
            card.text = f"{card.text.rstrip()}\n\n{_HEADING}\n\n{text}"
    card.data.tags = sorted({*(card.data.tags or []), "peft_prune", "pruning"})
    card.save(path)
