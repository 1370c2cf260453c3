"""The methods in a table, made from their recipes. The README holds it; a test compares the two."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from .. import methods


COLUMNS = ("importance", "rule", "update", "moment", "stored")
HEADINGS = ("importance", "rule and group", "update of kept weights", "mask is chosen", "stored")
# by type: what the method is called, its page, and the fields of what is shown of it beside the defaults
_PAGES: dict[str, tuple[str, str]] = {
    "SMP": ("SMP", "smp.md"),
    "MOVEMENT": ("movement pruning", "movement.md"),
    "DSEE": ("DSEE", "dsee.md"),
    "PPRUNING": ("P-pruning", "ppruning.md"),
    "STRUCTURED": ("structured pruning", "structured.md"),
    "WANDA": ("Wanda", "wanda.md"),
    "SPARSEGPT": ("SparseGPT", "sparsegpt.md"),
}
_SHOWN: dict[str, tuple[dict[str, Any], ...]] = {
    "MOVEMENT": (
        {"variant": "hard"},
        {"variant": "soft"},
        {"variant": "l0"},
        {"variant": "magnitude"},
        {"variant": "sparsegpt"},
        {"update": "low_rank"},
        {"from_existing_zeros": True},
    ),
    "PPRUNING": ({}, {"repair": True}),
    "STRUCTURED": ({"criterion": "loss"}, {"criterion": "activation"}, {"repair": False}, {"keep_layers": 24}),
    "WANDA": ({}, {"refine": None}, {"update": "low_rank"}),
    "SPARSEGPT": ({"solver": "admm"}, {"solver": "sparsegpt"}, {"update": "low_rank"}),
}


def _configs() -> list[Any]:
    """A config of each method with its defaults: known pages first, in their order."""
    kinds = [getattr(methods, name) for name in methods.__all__ if name.endswith("Config")]
    made = [kind() for kind in kinds]
    order = list(_PAGES)
    return sorted(made, key=lambda c: order.index(c.peft_type.value) if c.peft_type.value in order else len(order))


def method_titles() -> list[str]:
    """What each method is called, in the order of the tables."""
    return [_PAGES.get(c.peft_type.value, (c.peft_type.value, ""))[0] for c in _configs()]


def methods_table(docs: str = "docs/") -> str:
    """Each method's importance, rule, update and moment, and what is stored, as a table in Markdown.

    Args:
        docs (`str`): where the pages of the methods are, for the links.

    Returns:
        `str`: the lines of the table; each cell comes from the `recipe()` of a config.
    """
    lines = [_line(("method", *HEADINGS)), "|" + "---|" * (1 + len(HEADINGS))]
    for config in _configs():
        title, page = _PAGES.get(config.peft_type.value, (config.peft_type.value, ""))
        link = f"[{title}]({docs}{page})" if page else title
        for fields, shown in _variants(config):
            spelled = ", ".join(f"`{name}={value!r}`".replace("'", '"') for name, value in fields.items())
            described = shown.recipe().describe()
            lines.append(_line((f"{link}, {spelled}" if spelled else link, *(described[c] for c in COLUMNS))))
    return "\n".join(lines)


def _variants(config: Any) -> Iterator[tuple[dict[str, Any], Any]]:
    for fields in _SHOWN.get(config.peft_type.value, ({},)):
        yield fields, type(config)(**fields)


def _line(cells: tuple[str, ...]) -> str:
    return "| " + " | ".join(cells) + " |"
