"""Results of the accuracy benchmarks: JSON lines, one a run, and how a table shows the runs of several seeds."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any


def append(path: Path, row: dict[str, Any]) -> None:
    """Add a run to a file, and print it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        file.write(json.dumps(row) + "\n")
    print(json.dumps(row), flush=True)


def read(path: Path) -> list[dict[str, Any]]:
    """All runs in a file, none if there is no file."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def metrics_in(scores: dict[str, float]) -> dict[str, float]:
    """Accuracy or correlations among what `Trainer.evaluate` returns."""
    scores = {k.removeprefix("eval_"): v for k, v in scores.items()}
    return {k: scores[k] for k in ("accuracy", "pearson", "spearman") if k in scores}


def mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def mean_and_each(rows: Sequence[dict[str, Any]], metric: str) -> str:
    """Mean of a metric over runs, and in brackets that of each seed."""
    scores = [row["scores"][metric] for row in sorted(rows, key=lambda row: row["seed"])]
    if not scores:
        return "–"
    return f"{mean(scores):.1f} ({', '.join(f'{score:.1f}' for score in scores)})"
