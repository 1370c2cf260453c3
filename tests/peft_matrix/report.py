"""The table of what passed."""

from __future__ import annotations

import importlib.metadata
import re
from collections import Counter
from collections.abc import Sequence
from typing import Any

from .cases import METHODS
from .contradictions import CONTRADICTIONS


OUTCOMES = ("passed", "failed", "skipped", "contradicts")
NOT_FETCHED = "something of the Hub that has no stand-in could not be fetched"
_NAMED = 4  # tests that are named for a reason
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


def _by_module(parts: Sequence[dict[str, Any]]) -> list[list[Any]]:
    rows = []
    for part in parts:
        tests = part["tests"]
        counted, module = Counter(record["outcome"] for record in tests), tests[0]["test"].split("::")[0]
        rows.append([f"`{module}`", *(counted[outcome] for outcome in OUTCOMES), f"{part['seconds'] / 60:.1f}"])
    return sorted(rows)


def _contradictions(records: Sequence[dict[str, Any]]) -> list[list[Any]]:
    """A row for each reason: number of tests, methods, tests, the reason."""
    rows: dict[str, tuple[Counter[str], Counter[str]]] = {}
    for record in records:
        if record["outcome"] == "contradicts":
            tests, methods = rows.setdefault(CONTRADICTIONS[record["entry"]].reason, (Counter(), Counter()))
            tests[record["test"].split("::")[-1].split("[")[0]] += 1
            methods[record["method"]] += 1
    result = []
    for reason, (tests, methods) in rows.items():
        names = [f"`{name}`" for name in sorted(tests)]
        more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
        result.append([sum(tests.values()), ", ".join(sorted(methods)), ", ".join(names[:_NAMED]) + more, reason])
    return sorted(result, key=lambda row: -row[0])


def _skips(records: Sequence[dict[str, Any]]) -> list[list[Any]]:
    reasons: Counter[str] = Counter()
    for record in records:
        if record["outcome"] == "skipped":
            why = re.sub(r"<class '[\w.]*?(\w+)'>", "the method", record["why"])
            reasons[why] += 1
    return [[count, reason] for reason, count in reasons.most_common()]


def markdown(parts: Sequence[dict[str, Any]]) -> str:
    """The page: counts by method and by module, contradictions with their reasons, and what was skipped.

    Args:
        parts (`Sequence[dict]`): of each module what `run_module` returns.
    """
    records = [record for part in parts for record in part["tests"]]
    counts = summary(records)
    total = [sum(counted[outcome] for counted in counts.values()) for outcome in OUTCOMES]
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in _PACKAGES)
    by_method = [[method, *counted.values()] for method, counted in counts.items()]
    minutes = sum(part["seconds"] for part in parts) / 60
    days = " to ".join(sorted({min(part["date"] for part in parts), max(part["date"] for part in parts)}))
    unfetched = sum(record["why"] == NOT_FETCHED for record in records)
    return f"""# PEFT's own tests

PEFT tests every method with one matrix of tests. Here it is run with the methods of this package in the place of
theirs. The tests are those of the source distribution of the installed release, unchanged; a pytest plugin puts our
configurations into their tables. Tiny random models stand in for those of the Hub, of the same architectures. What is
not about one of our methods is left out.

    make peft-matrix

{days}, {versions}. One process with one thread on a CPU, one module after another, {minutes:.0f} minutes in all; other
programs were running on the same machine. P-pruning has masks only after calibration, so here it is given random ones
(`init_weights=False`); on modules without heads and neurons, such as PEFT's perceptrons, it is refused, as is SMP of
heads, so that only models of Transformers are in their rows. Convolutions, embeddings and `nn.MultiheadAttention` are
not in the matrix.

{_table(("method", *OUTCOMES), [*by_method, ["all", *total]])}
{_table(("module", *OUTCOMES, "minutes"), _by_module(parts))}
## What contradicts pruning

Each of these tests is expected to end in one certain error. It counts as failed if it ends in another, or passes.

{_table(("tests", "methods", "of", "reason"), _contradictions(records))}
## What is skipped

{unfetched} tests because something of the Hub, that has no stand-in, could not be fetched; the others skip themselves,
nearly all because they are about another kind of method.

{_table(("tests", "reason that the test gives"), _skips(records))}"""
