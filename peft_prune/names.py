"""Names out of files, made fit to be shown: a config may come from anybody."""

from __future__ import annotations

from typing import Any


def one_line(text: Any) -> str:
    """A text on one line, without control characters: nothing in it moves a terminal's cursor or begins a line."""
    joined = " ".join(str(text).split())
    return "".join(c if c.isprintable() else f"\\x{ord(c):02x}" for c in joined)


def code(text: Any) -> str:
    """A text as Markdown's code, in which neither HTML nor Markdown is read; fit for a cell of a table."""
    line = one_line(text).replace("|", "\\|")
    # a fence that is longer than any run of backticks in the text
    fence = "`"
    while fence in line:
        fence += "`"
    pad = " " if line.startswith("`") or line.endswith("`") or not line else ""
    return f"{fence}{pad}{line}{pad}{fence}"


def module_kind(name: str) -> str:
    """Kind of a module: its name without numbers, the same for all queries, for all keys, and so on."""
    return ".".join(part for part in name.split(".") if not part.isdigit())
