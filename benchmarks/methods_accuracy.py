"""Movement pruning and SMP side by side: accuracy at a density, with and without distillation.

One process runs one configuration and appends a JSON line; `--table` and `--plot` read the lines:

    python benchmarks/methods_accuracy.py --method hard --density 0.1 --seed 0 --teacher
    python benchmarks/methods_accuracy.py --method soft --penalty 400 --seed 0
    python benchmarks/methods_accuracy.py --table
    python benchmarks/methods_accuracy.py --plot docs/images/accuracy.png

With soft and L0 the penalty decides the density, which is reported; all others reach the one that is asked for.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any


os.environ.setdefault("HF_HUB_OFFLINE", "1")
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples"))

import torch
from offline_data import minilm_path
from peft import get_peft_model
from tasks import load_task
from text_classification import load_classifier, train, train_pruned
from transformers import AutoTokenizer, set_seed

from peft_prune import MovementPruningConfig, SMPConfig
from peft_prune.tuners.layer import pruning_layers
from peft_prune.tuners.schedule import sparsity


RESULTS = Path(__file__).resolve().parent / "results" / "methods_accuracy.jsonl"
METHODS = ("magnitude", "l0", "hard", "soft", "smp-l", "smp-s")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", choices=["movies", "stsb"], default="movies")
    parser.add_argument("--method", choices=METHODS)
    parser.add_argument("--density", type=float, default=0.1)
    parser.add_argument("--penalty", type=float, help="of soft and L0, which it gives their density")
    parser.add_argument("--score-init", default=None)
    parser.add_argument("--score-lr", type=float)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=565)
    parser.add_argument("--lr", type=float, default=1e-4, help="of the weights; the scores have their method's own")
    parser.add_argument("--teacher", action="store_true", help="distil from a dense model of the same seed")
    parser.add_argument("--teacher-steps", type=int, default=565)
    parser.add_argument("--value-dtype", default="float32")
    parser.add_argument("--save", help="folder for the adapter")
    parser.add_argument("--cache", type=Path, default=Path(tempfile.gettempdir()) / "peft_prune_teachers")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--table", action="store_true")
    parser.add_argument("--plot", type=Path)
    return parser.parse_args()


def make_config(args: argparse.Namespace) -> Any:
    fields: dict[str, Any] = {"task_type": "SEQ_CLS", "modules_to_save": ["pooler"]}
    if args.score_init is not None:
        fields["score_init"] = args.score_init
    if args.score_lr is not None:
        fields["score_lr"] = args.score_lr
    if args.method not in ("soft", "l0"):
        fields["density"] = args.density
    elif args.penalty is not None:
        fields["penalty"] = args.penalty
    if args.method.startswith("smp"):
        return SMPConfig(allocation="local" if args.method == "smp-l" else "score", **fields)
    return MovementPruningConfig(variant=args.method, value_dtype=args.value_dtype, **fields)


def teacher_for(args: argparse.Namespace, tokenizer: Any) -> Any:
    """A dense fine-tuned model, kept on disk so that runs share it."""
    folder = args.cache / f"{args.task}-{args.seed}-{args.teacher_steps}"
    if not (folder / "config.json").exists():
        train_set, eval_set, model, metrics = load_task(args.task, tokenizer)
        with tempfile.TemporaryDirectory() as scratch:
            train(
                model, tokenizer, train_set, eval_set, lr=1e-4, steps=args.teacher_steps, output_dir=scratch,
                seed=args.seed, use_cpu=True, quiet=True, compute_metrics=metrics,
            )  # fmt: skip
        model.save_pretrained(folder)
    return load_classifier(str(folder), num_labels=1 if args.task == "stsb" else 2)


def run(args: argparse.Namespace) -> dict:
    set_seed(args.seed)
    tokenizer = AutoTokenizer.from_pretrained(minilm_path())
    teacher = teacher_for(args, tokenizer) if args.teacher else None
    set_seed(args.seed)
    start = time.process_time()
    train_set, eval_set, model, metrics = load_task(args.task, tokenizer)
    model = get_peft_model(model, make_config(args))
    frozen = args.method.startswith("smp")
    with tempfile.TemporaryDirectory() as folder:
        trainer = train_pruned(
            model, tokenizer, train_set, eval_set, lr=1e-3 if frozen else args.lr, steps=args.steps, output_dir=folder,
            seed=args.seed, use_cpu=True, quiet=True, compute_metrics=metrics, teacher=teacher,
        )  # fmt: skip
        scores = {k.removeprefix("eval_"): v for k, v in trainer.evaluate().items()}
    if args.save:
        model.save_pretrained(args.save)
    layers = pruning_layers(model)
    stored = sum(layer.mask["default"].numel() for layer in layers)
    stored += sum(layer.values["default"].numel() for layer in layers if "default" in layer.values)
    settings = {k: v for k, v in vars(args).items() if k not in ("results", "table", "plot", "cache", "save")}
    return settings | {
        "scores": {k: scores[k] for k in ("accuracy", "pearson", "spearman") if k in scores},
        "density": 1.0 - sparsity(layers, "default"), "bytes": stored,
        "dense_bytes": 4 * sum(layer.shape[0] * layer.shape[1] for layer in layers),
        "cpu_seconds": time.process_time() - start, "torch": torch.__version__, "threads": torch.get_num_threads(),
    }  # fmt: skip


def read(path: Path) -> dict[tuple, list[dict]]:
    groups: dict[tuple, list[dict]] = {}
    for row in map(json.loads, path.read_text().splitlines()):
        # soft and L0 land near a density and not on it
        near = min((0.5, 0.15, 0.1, 0.03), key=lambda d: abs(d - row["density"]) / d)
        groups.setdefault((row["task"], row["method"], bool(row["teacher"]), near), []).append(row)
    return groups


def table(path: Path) -> str:
    lines = ["| task | method | distilled | density, mean | metric | mean (each seed) | bytes |", "|---|" + "---|" * 6]
    for (task, method, distilled, _), rows in sorted(read(path).items()):
        rows = sorted(rows, key=lambda row: row["seed"])
        density = sum(row["density"] for row in rows) / len(rows)
        for metric in rows[0]["scores"]:
            scores = [row["scores"][metric] for row in rows]
            each = ", ".join(f"{score:.1f}" for score in scores)
            mean = f"{sum(scores) / len(scores):.1f} ({each})"
            distil = "yes" if distilled else "no"
            lines.append(f"| {task} | {method} | {distil} | {density:.3f} | {metric} | {mean} | {rows[0]['bytes']:,} |")
    return "\n".join(lines)


def plot(path: Path, target: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4), layout="constrained")
    for axes, distilled in zip(figure.subplots(1, 2, sharey=True), (False, True), strict=True):
        for method in METHODS:
            points = []
            for (task, name, teacher, _), rows in read(path).items():
                if (task, name, teacher) == ("movies", method, distilled):
                    mean = [sum(r["density"] for r in rows), sum(r["scores"]["accuracy"] for r in rows)]
                    points.append([value / len(rows) for value in mean])
            if points:
                x, y = zip(*sorted(points), strict=True)
                axes.plot([100 * value for value in x], y, marker="o", label=method)
        axes.set_xscale("log")
        axes.set_xlabel("weights kept, %")
        axes.set_title("distilled" if distilled else "not distilled")
        axes.legend()
    figure.axes[0].set_ylabel("accuracy on movie sentences, %")
    figure.savefig(target, dpi=150)


if __name__ == "__main__":
    arguments = parse()
    if arguments.table:
        print(table(arguments.results))
    elif arguments.plot:
        plot(arguments.results, arguments.plot)
    else:
        result = run(arguments)
        arguments.results.parent.mkdir(parents=True, exist_ok=True)
        with arguments.results.open("a") as file:
            file.write(json.dumps(result) + "\n")
        print(json.dumps(result))
