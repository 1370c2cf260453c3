"""Reads the docstrings of this package, which are written as in Transformers and PEFT, for the API reference.

Types stand in backticks, and links are a name in backticks and brackets. Griffe wants plain types, and links of
mkdocs-autorefs.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import griffe


TYPED = re.compile(r"^(\s+[\w*, /]+) \((.*)\):", re.MULTILINE)
RETURNED = re.compile(r"^(\s+(?:Returns|Yields):\n\s+)`([^`\n]+)`:", re.MULTILINE)
FENCED = re.compile(r"^\s*```py\n(.*?)^\s*```$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\[`~?([\w.]+)`\](?![\[(])")


def plain_type(match: re.Match[str]) -> str:
    """`name (`type`, *optional*):` as `name (type, optional):`."""
    return f"{match[1]} ({match[2].replace('`', '').replace('*', '').strip()}):"


class HuggingFaceStyle(griffe.Extension):
    """Rewrites docstrings as they are read."""

    def __init__(self) -> None:
        super().__init__()
        page = Path(__file__).parents[1] / "reference.md"
        self.identifiers = {name.rsplit(".", 1)[-1]: name for name in re.findall(r"^::: (\S+)", page.read_text(), re.M)}

    def link(self, match: re.Match[str]) -> str:
        """A link if the name has an entry in the reference, and the name alone otherwise."""
        name = match[1].rsplit(".", 1)[-1]
        return f"[`{name}`][{self.identifiers[name]}]" if name in self.identifiers else f"`{name}`"

    def on_instance(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        """Called for every module, class, function and attribute."""
        if obj.docstring is not None:
            text = FENCED.sub(r"\1", obj.docstring.value)  # griffe sees to `>>>` by itself
            text = RETURNED.sub(r"\1\2:", TYPED.sub(plain_type, text))
            obj.docstring.value = LINK.sub(self.link, text)
