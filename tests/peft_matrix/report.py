"""The table of what passed."""

from __future__ import annotations

import datetime
import importlib.metadata
from collections import Counter
from collections.abc import Sequence
from typing import Any

from .cases import METHODS
from .contradictions import CONTRADICTIONS


OUTCOMES = ("passed", "failed", "skipped", "contradicts")
_PACKAGES = ("peft", "transformers", "torch", "pytest")


def summary(records: Sequence[dict[str, Any]]) -> dict[str, dict[str, int]]:
    """Number of tests by method and outcome."""
    counts = {method: Counter[str]() for method in METHODS}
    for record in records:
        counts[record["method"]][record["outcome"]] += 1
    return {method: {outcome: counted[outcome] for outcome in OUTCOMES} for method, counted in counts.items()}


def _table(head: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines) + "\n"


def _by_module(records: Sequence[dict[str, Any]]) -> list[list[Any]]:
    counts: dict[str, Counter[str]] = {}
    for record in records:
        counts.setdefault(record["test"].split("::")[0], Counter())[record["outcome"]] += 1
    return [[f"`{module}`", *(counted[outcome] for outcome in OUTCOMES)] for module, counted in sorted(counts.items())]


def _skips(records: Sequence[dict[str, Any]]) -> list[list[Any]]:
    reasons: Counter[str] = Counter()
    for record in records:
        if record["outcome"] == "skipped":
            # some name the class
            reasons[record["why"].split(" for <class")[0].split("<class ")[-1].split("'> ")[-1]] += 1
    return [[count, reason] for reason, count in reasons.most_common()]


def markdown(records: Sequence[dict[str, Any]], minutes: float) -> str:
    """The page: counts by method and by module, contradictions with their reasons, and what was skipped."""
    counts = summary(records)
    hits = Counter(record["entry"] for record in records if record["outcome"] == "contradicts")
    total = [sum(counted[outcome] for counted in counts.values()) for outcome in OUTCOMES]
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in _PACKAGES)
    by_method = [[method, *counted.values()] for method, counted in counts.items()]
    entries = [
        [f"`{entry.test}`", f"`{entry.methods}`", hits[index], entry.reason]
        for index, entry in enumerate(CONTRADICTIONS)
    ]
    return f"""# PEFT's own tests

PEFT tests every method with one matrix of tests. Here it is run with the methods of this package in the place of
theirs. The tests are those of the source distribution of the installed release, unchanged; a pytest plugin puts our
configurations into their tables. Tiny random models stand in for those of the Hub, of the same architectures.

    make peft-matrix

{datetime.date.today().isoformat()}, {versions}; {minutes:.0f} minutes in one process on a shared CPU. P-pruning has
masks only after calibration, so here it is given random ones (`init_weights=False`); on modules without heads and
neurons, such as PEFT's perceptrons, it is refused, and only models of Transformers are in its row. Convolutions,
embeddings and `nn.MultiheadAttention` are not in the matrix.

{_table(("method", *OUTCOMES), [*by_method, ["all", *total]])}
{_table(("module", *OUTCOMES), _by_module(records))}
## What contradicts pruning

Each of these is expected to fail, and is reported if it passes.

{_table(("test", "methods", "tests", "reason"), entries)}
## What PEFT's tests skip

{_table(("tests", "reason that the test gives"), _skips(records))}"""
