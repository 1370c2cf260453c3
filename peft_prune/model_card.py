"""The adapter's README.md: PEFT writes it, this adds what a reader needs to load a mask.

What is added stands between two comments and is replaced there; text outside of them is somebody's, and stays.
"""

from __future__ import annotations

import os
import re
from typing import Any

from huggingface_hub import ModelCard, ModelCardData

from .names import code


BEGIN, END = "<!-- peft_prune:begin -->", "<!-- peft_prune:end -->"
HEADING = "## How to Get Started with the Model"
_EMPTY = "[More Information Needed]"
# from the last begin before an end: a begin that has lost its end must not swallow the text after it
_BLOCK = re.compile(rf"^{BEGIN}[ \t\r]*$(?:(?!^{BEGIN}).)*?^{END}[ \t\r]*$", re.MULTILINE | re.DOTALL)


def loading_instructions(config: Any) -> str:
    """Markdown that says what the adapter is and how to load it.

    Args:
        config ([`PruningConfig`]): the adapter's configuration.
    """
    method = getattr(config.peft_type, "value", config.peft_type)
    resume = "" if config.finalized or not config.recipe().trained else ", is_trainable=True"
    return (
        f"{_what_it_is(config, method)} Install `peft_prune` and import it before "
        "loading: the import registers the method with PEFT.\n\n"
        "```python\n"
        f"import peft_prune  # registers {method} with PEFT\n"
        "from peft import PeftModel\n\n"
        f'model = PeftModel.from_pretrained(base_model, "this/adapter"{resume})\n'
        "```\n"
    )


def _what_it_is(config: Any, method: str) -> str:
    name = config.base_model_name_or_path
    base = code(name) if name else "the base model"
    how = f"({method}, granularity `{config.granularity}`, allocation `{getattr(config, 'allocation', 'local')}`)"
    if config.finalized:
        return f"This adapter prunes {base} to a sparsity of {_percent(_final_sparsity(config))} {how}."
    if not config.recipe().trained:
        return f"This adapter prunes nothing of {base} yet: it has to be calibrated with `peft_prune.calibrate` {how}."
    reached = config.sparsity_when_saved
    so_far = "" if reached is None else f" The sparsity was {_percent(reached)} when it was saved."
    if config.recipe().rule.finds_sparsity:
        target = "Training decides the sparsity."
    else:
        target = f"The target is a sparsity of {_percent(config.sparsity)}."
    return (
        f"This is a training checkpoint of an adapter that prunes {base} {how}; its masks are not final.{so_far} "
        f"{target} Train to the end, call `peft_prune.finalize(model)` and save again to share the masks."
    )


def _percent(share: float) -> str:
    return f"{100 * share:.3g}%"


def _final_sparsity(config: Any) -> float:
    """By what the masks keep, where that is recorded: training may have ended before the target."""
    infos = list((config.mask_info or {}).values())
    size = sum(info["shape"][0] * info["shape"][1] for info in infos)
    return 1.0 - sum(info["kept"] for info in infos) / size if size else config.sparsity


def put_block(text: str, content: str) -> str:
    """Put our block into the text of a card: over the one that is there, or else where loading is explained.

    Args:
        text (`str`): Markdown without metadata.
        content (`str`): Markdown of the block.

    Returns:
        `str`: the text with the block; nothing else of it is changed.
    """
    block = f"{BEGIN}\n{content.strip()}\n{END}"
    if _BLOCK.search(text):
        return _BLOCK.sub(lambda _: block, text, count=1)
    before, heading, after = text.partition(HEADING)
    if not heading:
        return f"{text.rstrip()}\n\n{HEADING}\n\n{block}\n"
    section, next_heading, rest = after.partition("\n## ")
    if _EMPTY in section:
        section = section.replace(_EMPTY, block, 1)
    else:
        section = f"{section.rstrip()}\n\n{block}\n"
    return before + heading + section + next_heading + rest


def is_as_saved(text: str) -> bool:
    """Whether outside our block a card's text has no line but those of PEFT's empty template."""
    template = {line.strip() for line in ModelCard.from_template(ModelCardData()).text.splitlines()}
    template.add("### Framework versions")
    lines = (line.strip() for line in _BLOCK.sub("", text).splitlines())
    return all(not line or line in template or line.startswith("- PEFT ") for line in lines)


def add_loading_instructions(folder: str | os.PathLike, config: Any) -> None:
    """Put the instructions into the README.md of a folder, or bring those up to date that are there.

    Args:
        folder (`str` or `os.PathLike`): where the adapter was saved; nothing happens if it has no README.md
            of PEFT's. One that says in words of its own to import the package is left as it is.
        config ([`PruningConfig`]): the adapter's configuration.
    """
    path = os.path.join(folder, "README.md")
    if not os.path.isfile(path):
        return
    card = ModelCard.load(path)
    if card.data.library_name != "peft":  # somebody's README.md, not an adapter's
        return
    text = loading_instructions(config)
    # a block of `peft-prune card` that begins with the same instructions stays, with its table
    current = text in card.text if _BLOCK.search(card.text) else "import peft_prune" in card.text
    if not current:
        card.text = put_block(card.text, text)
    card.data.tags = sorted({*(card.data.tags or []), "peft_prune", "pruning"})
    card.save(path)
