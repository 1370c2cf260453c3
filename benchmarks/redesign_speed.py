"""Two versions of the package beside each other: a training step, inference, P-pruning's search, loading.

A child process runs a measure with one version, then another child with the other one, in turns; each child reports
the median of its runs. What is printed is before ÷ after, so above 1 is faster. BERT-base's shape, random weights, CPU
seconds of one thread.

    git worktree add ../before 357352c
    OMP_NUM_THREADS=1 python benchmarks/redesign_speed.py --before ../before --after .
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, get_peft_model
from scaffold import FOLDER, environment, make_parser, write
from transformers import BertConfig, BertForSequenceClassification


RESULTS = FOLDER / "redesign_speed.json"
BATCH, LENGTH, STEPS, RUNS = 8, 64, 1000, 3
FIELDS: dict[str, Any] = {"task_type": "SEQ_CLS", "sparsity": 0.9}
Times = dict[str, float]


def bert() -> Any:
    torch.manual_seed(0)
    return BertForSequenceClassification(BertConfig())


def inputs(batch: int, length: int) -> torch.Tensor:
    return torch.randint(5, 30000, (batch, length), generator=torch.Generator().manual_seed(1))


def seconds(call: Callable[[], Any]) -> float:
    start = time.process_time()
    call()
    return time.process_time() - start


def median(call: Callable[[], Any], runs: int = RUNS) -> float:
    """Of several runs, after one that does not count."""
    call()
    return statistics.median(seconds(call) for _ in range(runs))


def final_adapter(folder: Path, sparsity: float) -> None:
    from peft_prune import SMPConfig, finalize, update_schedule

    model = get_peft_model(bert(), SMPConfig(**FIELDS | {"sparsity": sparsity}))
    update_schedule(model, 1, 1)
    finalize(model)
    model.save_pretrained(folder)


def training_step(folder: Path) -> Times:
    from peft_prune import SMPConfig, create_pruning_optimizer, update_schedule

    model = get_peft_model(bert(), SMPConfig(allocation="score", **FIELDS))
    optimizer = create_pruning_optimizer(model, lr=1e-4, fused=True)
    ids, labels = inputs(BATCH, LENGTH), torch.zeros(BATCH, dtype=torch.long)
    numbers = iter(range(STEPS // 2, STEPS))

    def step() -> None:
        update_schedule(model, next(numbers), STEPS)
        model(input_ids=ids, labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    step()
    return {"SMP training step": median(step)}


def load(folder: Path) -> Times:
    """Loading and the first forward pass, and those after it."""
    ids, times = inputs(1, 128), {}
    with torch.no_grad():
        for density in (0.5, 0.1):
            rows = []
            for _ in range(RUNS):
                base = bert().eval()
                base(ids)
                loaded: list[Any] = []
                loading = seconds(
                    lambda b=base, m=loaded, d=density: m.append(PeftModel.from_pretrained(b, folder / f"{d}"))
                )
                model = loaded[0].eval()
                rows.append((loading, seconds(lambda m=model: m(ids)), median(lambda m=model: m(ids))))
            loading, first, later = (statistics.median(column) for column in zip(*rows, strict=True))
            what = f"density {density}"
            times |= {f"load and first forward, {what}": loading + first, f"eval forward, {what}": later}
            times |= {f"(load, {what})": loading, f"(first forward, {what})": first}
    return times


def search(folder: Path) -> Times:
    """Calibration of the whole model on 4 batches."""
    from peft_prune import PPruningConfig, calibrate

    batches = [{"input_ids": inputs(4, 64)} for _ in range(4)]

    def calibrated() -> None:
        calibrate(get_peft_model(base, PPruningConfig(task_type="SEQ_CLS", keep_ratio=0.5)), batches)

    times = []
    for _ in range(RUNS):
        base = bert().eval()
        times.append(seconds(calibrated))
    return {"P-pruning search": statistics.median(times)}


MEASURES: dict[str, Callable[[Path], Times]] = {"step": training_step, "load": load, "search": search}


def child(tree: Path, *arguments: str) -> str:
    """What this file prints when it runs with another version of the package."""
    settings = {"PYTHONPATH": str(tree.resolve()), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", __file__, *arguments],
        env=os.environ | settings,
        capture_output=True,
        text=True,
    )
    if done.returncode:
        raise RuntimeError(f"{tree}: {done.stderr[-2000:]}")
    return done.stdout.strip().splitlines()[-1]


def compare(args: argparse.Namespace, folder: Path) -> dict[str, dict[str, Any]]:
    """Ratios of each measure over pairs of processes, which take turns in who is first."""
    pairs: dict[str, list[tuple[float, float]]] = {}
    for name in args.measures:
        for turn in range(args.pairs):
            found: dict[Path, Times] = {}
            for tree in (args.before, args.after)[:: -1 if turn % 2 else 1]:
                found[tree] = json.loads(child(tree, "--child", name, "--adapters", str(folder)))
            for what, before in found[args.before].items():
                pairs.setdefault(what, []).append((before, found[args.after][what]))
    rows = {}
    for what, each in pairs.items():
        ratios = sorted(before / after for before, after in each)
        before, after = (statistics.median(column) for column in zip(*each, strict=True))
        rows[what] = {
            "before_over_after": statistics.median(ratios),
            "ratios": ratios,
            "before": before,
            "after": after,
        }
    return rows


def main(args: argparse.Namespace) -> None:
    with tempfile.TemporaryDirectory() as folder:
        if "load" in args.measures:
            child(args.before, "--child", "prepare", "--adapters", folder)
        rows = compare(args, Path(folder))
    old = json.loads(args.results.read_text())["measures"] if args.results.exists() else {}
    for what, row in rows.items():
        print(f"{what:40} {row['before_over_after']:.2f}  ({row['before']:.3f} s ÷ {row['after']:.3f} s)")
    conditions = {"date": datetime.date.today().isoformat(), "machine": args.machine, "pairs": args.pairs}
    write(args.results, conditions | environment() | {"unit": "CPU seconds", "measures": old | rows})


def parse() -> argparse.Namespace:
    parser = make_parser(__doc__, RESULTS)
    parser.add_argument("--before", type=Path, help="checkout of the one version")
    parser.add_argument("--after", type=Path, default=Path(), help="checkout of the other")
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--measures", nargs="*", choices=list(MEASURES), default=list(MEASURES))
    parser.add_argument("--machine", default=f"{os.cpu_count()} cores, no GPU", help="recorded with the results")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    parser.add_argument("--adapters", type=Path, help=argparse.SUPPRESS)
    return parser.parse_args()


if __name__ == "__main__":
    arguments = parse()
    if arguments.child == "prepare":
        for density in (0.5, 0.1):
            final_adapter(arguments.adapters / f"{density}", round(1 - density, 3))
        print("done")
    elif arguments.child:
        import peft_prune  # noqa: F401  (registers the methods with PEFT)

        torch.set_num_threads(1)
        print(json.dumps(MEASURES[arguments.child](arguments.adapters)))
    else:
        main(arguments)
