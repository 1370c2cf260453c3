"""What all benchmarks share: their arguments, how results are written and read, and tables in Markdown."""

from __future__ import annotations

import argparse
import json
import platform
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch


FOLDER = Path(__file__).resolve().parent / "results"
# arguments that say where results go and what is shown of them, and nothing about a run
_OUTPUT = ("results", "table", "plot")


def make_parser(description: str | None, results: Path, table: bool = False, plot: bool = False) -> Any:
    """A parser with `--results`, and where there are any, `--table` and `--plot`.

    Args:
        description (`str`): the benchmark's docstring.
        results (`Path`): the file that holds its results, in `results/`.
        table (`bool`): whether it can print a table of them without running.
        plot (`bool`): whether it can draw them.
    """
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=results, help="file of the results")
    if table:
        parser.add_argument("--table", action="store_true", help="only print the table of the results")
    if plot:
        parser.add_argument("--plot", type=Path, help="only draw the results into this file")
    return parser


def settings(args: argparse.Namespace, *left_out: str) -> dict[str, Any]:
    """The arguments of a run, as they are recorded with its result."""
    return {name: value for name, value in vars(args).items() if name not in (*_OUTPUT, *left_out)}


def append(path: Path, row: dict[str, Any]) -> None:
    """Add a run to a file of JSON lines, and print it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        file.write(json.dumps(row) + "\n")
    print(json.dumps(row), flush=True)


def read(path: Path) -> list[dict[str, Any]]:
    """All runs in a file of JSON lines, none if there is no file."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def show_or_run(
    args: argparse.Namespace, table: Callable[[Path], str], run: Callable[[argparse.Namespace], dict[str, Any]]
) -> None:
    """Print the table, or run and append what the run gives to the results."""
    if args.table:
        print(table(args.results))
    else:
        append(args.results, run(args))


def write(path: Path, result: Any, indent: int | None = 2) -> None:
    """Write a result as one JSON document, in place of the one that was there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=indent) + "\n")


def cpu_name() -> str:
    """The processor's name, empty if the system does not say."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    return next((line.split(":")[1].strip() for line in lines if "model name" in line), "")


def environment() -> dict[str, Any]:
    """Versions and threads, which are recorded with a run."""
    return {"torch": torch.__version__, "threads": torch.get_num_threads()}


def machine() -> str:
    """What kind of processor this is."""
    return platform.processor() or platform.machine()


def markdown(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table."""
    lines = [f"| {' | '.join(cells)} |" for cells in (head, *rows)]
    return "\n".join([lines[0], "|" + "---|" * len(head), *lines[1:]])


def metrics_in(scores: dict[str, float]) -> dict[str, float]:
    """Accuracy or correlations among what `Trainer.evaluate` returns."""
    scores = {k.removeprefix("eval_"): v for k, v in scores.items()}
    return {k: scores[k] for k in ("accuracy", "pearson", "spearman") if k in scores}


def mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def mean_and_each(rows: Sequence[dict[str, Any]], metric: str) -> str:
    """Mean of a metric over runs, and in brackets that of each seed."""
    # the oldest results have no "scores", but the metric itself
    scores = [row.get("scores", row)[metric] for row in sorted(rows, key=lambda row: row["seed"])]
    if not scores:
        return "–"
    return f"{mean(scores):.1f} ({', '.join(f'{score:.1f}' for score in scores)})"
