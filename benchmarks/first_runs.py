"""First runs: every method as a new user would run it, with its defaults and nothing but the sparsity.

One process runs one configuration, or what the results lack of a grid, and appends a JSON line for each:

    python benchmarks/first_runs.py --grid --tasks movies stsb --sparsities 0.9 --seeds 0 --dtype bfloat16
    python benchmarks/first_runs.py --task movies --method hard --sparsity 0.9 --seed 0
    python benchmarks/first_runs.py --task movies --method hard --set score_init='"zeros"'   # a probe: not in the table
    python benchmarks/first_runs.py --table

all-MiniLM-L6-v2, 300 steps of 32. The learning rate is what a user would take: 1e-4 where weights are fine-tuned, 1e-3
for a LoRA, or where only scores and a classifier are trained. Scores have that of their config. L0 is given no
sparsity, since its penalty decides. "sparsegpt between" is the recipe of docs/choosing.md: dense fine-tuning for half
of the steps, then SparseGPT, then the weights that are kept are trained for the other half.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any


os.environ.setdefault("HF_HUB_OFFLINE", "1")
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples"))

import torch
from offline_data import minilm_path
from peft import LoraConfig, get_peft_model
from scaffold import FOLDER, append, environment, make_parser, markdown, mean, metrics_in, read, settings
from tasks import SENTENCES, TASKS, load_task, metric_of
from text_classification import train, train_pruned
from torch.utils.data import DataLoader
from transformers import AutoTokenizer, DataCollatorWithPadding, EvalPrediction, TrainerCallback, set_seed

from peft_prune import DSEEConfig, MovementPruningConfig, PPruningConfig, SMPConfig, SparseGPTConfig, calibrate
from peft_prune.layers.layer import pruning_layers
from peft_prune.stages.sparsity_reached import sparsity


RESULTS = FOLDER / "first_runs.jsonl"
STEPS, FINE_TUNING, LORA = 300, 1e-4, 1e-3
CURVE = 400  # examples with which the curve over training is measured


def _movement(variant: str) -> Callable[..., Any]:
    return lambda **fields: MovementPruningConfig(variant=variant, **fields)


# learning rate, and how a config is made
METHODS: dict[str, tuple[float, Callable[..., Any]]] = {
    "smp": (LORA, SMPConfig),
    "hard": (FINE_TUNING, _movement("hard")),
    "soft": (FINE_TUNING, _movement("soft")),
    "l0": (FINE_TUNING, _movement("l0")),
    "magnitude": (FINE_TUNING, _movement("magnitude")),
    "sparsegpt": (FINE_TUNING, _movement("sparsegpt")),
    "dsee": (LORA, DSEEConfig),
    "p-pruning": (FINE_TUNING, PPruningConfig),
    "sparsegpt between": (FINE_TUNING, SparseGPTConfig),
}
BASELINES = {"dense": FINE_TUNING, "lora": LORA}  # "majority" is not trained


def parse() -> argparse.Namespace:
    parser = make_parser(__doc__, RESULTS, table=True)
    parser.add_argument("--task", choices=TASKS, default="movies")
    parser.add_argument("--method", choices=["majority", *BASELINES, *METHODS], default="hard")
    parser.add_argument("--sparsity", type=float, default=0.9)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--lr", type=float, help="by default as above")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32", help="of products, by autocast")
    parser.add_argument("--set", nargs="*", default=[], metavar="FIELD=JSON", help="fields of the config: a probe")
    parser.add_argument("--curve", type=int, default=60, help=f"evaluate on {CURVE} examples every so many steps")
    parser.add_argument("--grid", action="store_true", help="run what the results lack")
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=TASKS)
    parser.add_argument("--methods", nargs="+", default=["majority", *BASELINES, *METHODS])
    parser.add_argument("--sparsities", nargs="+", type=float, default=[0.9, 0.5])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    return parser.parse_args()


class Curve(TrainerCallback):
    """Notes the metric on a few examples, and the sparsity, as training goes on."""

    def __init__(self, every: int, eval_set: Any, tokenizer: Any, metrics: Any) -> None:
        self.every, self.metrics, self.points = every, metrics, []
        few = eval_set.shuffle(seed=0).select(range(min(CURVE, len(eval_set)))).remove_columns("length")
        self.batches = list(DataLoader(few, 100, collate_fn=DataCollatorWithPadding(tokenizer)))

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        if not self.every or state.global_step % self.every:
            return
        model.eval()
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=args.bf16):
            logits = torch.cat([model(**batch).logits.float() for batch in self.batches]).numpy()
        model.train()
        labels = torch.cat([batch["labels"] for batch in self.batches]).numpy()
        found = self.metrics(EvalPrediction(logits, labels))
        self.points.append([state.global_step, round(reached(model), 3), *(round(v, 1) for v in found.values())])
        print(self.points[-1], file=sys.stderr, flush=True)


def reached(model: Any) -> float:
    """Sparsity of the target weights; of DSEE of the modules that are pruned."""
    layers = pruning_layers(model)
    layers = [layer for layer in layers if getattr(layer.host["default"], "pruned", True)]
    return sparsity(layers, "default") if layers else 0.0


def wrap(args: argparse.Namespace, model: Any, train_set: Any, tokenizer: Any) -> Any:
    """The model with the method's adapter; pruned and merged already, if the method prunes before training."""
    fields = {name: json.loads(value) for name, _, value in (item.partition("=") for item in args.set)}
    if args.method == "dense":
        return model
    if args.method == "lora":
        return get_peft_model(model, LoraConfig(task_type="SEQ_CLS", **fields))
    if args.method == "p-pruning":
        fields["keep_ratio"] = round(1.0 - args.sparsity, 6)  # of the FLOPs: the field that it has
    elif args.method != "l0":  # of which the penalty decides
        fields = {"sparsity": args.sparsity} | fields
    fields = {name: value for name, value in fields.items() if value is not None}
    model = get_peft_model(model, METHODS[args.method][1](task_type="SEQ_CLS", **fields))
    if args.method != "p-pruning":
        return model
    rows = train_set.shuffle(seed=args.seed).select(range(64)).remove_columns(["labels", "length"])
    calibrate(model, [dict(tokenizer.pad(rows[i : i + 32], return_tensors="pt")) for i in (0, 32)])
    return model.merge_and_unload()


def pruned_between(args: argparse.Namespace, sets: tuple[Any, Any], model: Any, tokenizer: Any, how: dict) -> Any:
    """A model that was trained for half of the steps and then pruned; the weights that it kept can be trained."""
    model = train(model, tokenizer, *sets, steps=args.steps // 2, **how).model
    config = SparseGPTConfig(task_type="SEQ_CLS", sparsity=args.sparsity, num_samples=256)
    rows = sets[0].shuffle(seed=args.seed).select(range(256)).remove_columns(["labels", "length"])
    model = get_peft_model(model, config)
    calibrate(model, [dict(tokenizer.pad(rows[i : i + 32], return_tensors="pt")) for i in range(0, 256, 32)])
    sparse = model.merge_and_unload()
    return get_peft_model(sparse, MovementPruningConfig(task_type="SEQ_CLS", from_existing_zeros=True))


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Train and evaluate one configuration: a row of the results."""
    rate = args.lr or (BASELINES | {name: method[0] for name, method in METHODS.items()})[args.method]
    set_seed(args.seed)
    tokenizer = AutoTokenizer.from_pretrained(minilm_path())
    start = time.process_time()
    train_set, eval_set, model, metrics = load_task(args.task, tokenizer)
    with warnings.catch_warnings(record=True) as caught, tempfile.TemporaryDirectory() as folder:
        warnings.simplefilter("always")
        how: dict[str, Any] = {
            "lr": rate, "output_dir": folder, "seed": args.seed, "use_cpu": True, "quiet": True,
            "bf16": args.dtype == "bfloat16", "batch_size": args.batch_size, "compute_metrics": metrics,
        }  # fmt: skip
        steps = args.steps
        if args.method == "sparsegpt between":
            model = pruned_between(args, (train_set, eval_set), model, tokenizer, how)
            steps -= steps // 2
        else:
            model = wrap(args, model, train_set, tokenizer)
        trained = getattr(model, "peft_config", {}) and args.method not in BASELINES
        curve = Curve(args.curve, eval_set, tokenizer, metrics)
        trainer = (train_pruned if trained else train)(
            model, tokenizer, train_set, eval_set, steps=steps, callbacks=[curve], **how
        )
        scores = metrics_in(trainer.evaluate())
    told = sorted({str(w.message)[:200] for w in caught if "=" in str(w.message) and w.category is UserWarning})
    row = shown_settings(args) | {"lr": rate, "scores": scores, "warnings": told}
    row |= {"reached": reached(model) if trained else None, "curve": curve.points}
    return row | {"cpu_seconds": round(time.process_time() - start)} | environment()


def shown_settings(args: argparse.Namespace) -> dict[str, Any]:
    return settings(args, "grid", "tasks", "methods", "sparsities", "seeds", "curve")


def majority(args: argparse.Namespace) -> dict[str, Any]:
    """Share of the largest class; a constant has no correlation."""
    if args.task not in SENTENCES:
        scores = {"pearson": 0.0, "spearman": 0.0}
    else:
        labels = Counter(label for _, label in SENTENCES[args.task][0]()[1])
        scores = {"accuracy": 100.0 * max(labels.values()) / sum(labels.values())}
    return shown_settings(args) | {"scores": scores}


def key(row: dict[str, Any]) -> tuple[Any, ...]:
    """What makes two rows the same run; baselines have no sparsity."""
    asked = row["sparsity"] if row["method"] in METHODS else 0.0
    return row["task"], row["method"], asked, row["seed"], row["steps"], row["dtype"], *row["set"]


def grid(args: argparse.Namespace) -> None:
    """Run what the results lack, the seeds in turn."""
    for seed in args.seeds:
        for task in args.tasks:
            for method in args.methods:
                for asked in args.sparsities if method in METHODS else [0.0]:
                    cell = argparse.Namespace(
                        **(vars(args) | {"task": task, "method": method, "sparsity": asked, "seed": seed})
                    )
                    if key(vars(cell)) not in {key(row) for row in read(args.results)}:
                        append(args.results, majority(cell) if method == "majority" else run(cell))


def table(path: Path) -> str:
    """For each sparsity, a row for each method and a column for each task."""
    rows = [row for row in read(path) if not row["set"] and row["steps"] == STEPS]
    lines = []
    for asked in sorted({row["sparsity"] for row in rows if row["method"] in METHODS}, reverse=True):
        body = []
        for method in ("majority", *BASELINES, *METHODS):
            ours = [row for row in rows if row["method"] == method]
            ours = [row for row in ours if method not in METHODS or row["sparsity"] == asked]
            body.append([method, *(_cell([row for row in ours if row["task"] == task], task, asked) for task in TASKS)])
        lines += [f"\nsparsity {asked:g}\n", markdown(["method", *TASKS], body)]
    return "\n".join(lines)


def _cell(rows: list[dict[str, Any]], task: str, asked: float) -> str:
    if not rows:
        return "–"
    rows = sorted(rows, key=lambda row: row["seed"])
    found = [row["scores"][metric_of(task)] for row in rows]
    cell = f"{mean(found):.1f}" + (f" ({', '.join(f'{value:.1f}' for value in found)})" if len(found) > 1 else "")
    shares = [row["reached"] for row in rows if row.get("reached") is not None]
    off = shares and max(abs(share - asked) for share in shares) > 0.01
    return cell + (f" at {mean(shares):.0%}" if off else "")


if __name__ == "__main__":
    arguments = parse()
    if arguments.table:
        print(table(arguments.results))
    elif arguments.grid:
        grid(arguments)
    elif arguments.method == "majority":
        append(arguments.results, majority(arguments))
    else:
        append(arguments.results, run(arguments))
