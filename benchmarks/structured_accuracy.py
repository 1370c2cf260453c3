"""Structured pruning of MiniLM on movie sentences and STS-B, beside P-pruning and the simplest choices.

    python benchmarks/structured_accuracy.py --task stsb --seed 0
    python benchmarks/structured_accuracy.py --table

Two ways. "pruned at the end": a dense model is fine-tuned, pruned with sentences of the task, and not trained any more.
"pruned first": the pre-trained model, with a new head, is pruned with sentences of the task, and then fine-tuned like
the dense one. Beside them LoRA of rank 8, unpruned, trained as long. FLOPs are counted at 32 tokens.
"""

from __future__ import annotations

import argparse
import copy
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any


os.environ.setdefault("HF_HUB_OFFLINE", "1")
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples"))

from offline_data import minilm_path
from peft import LoraConfig, get_peft_model
from scaffold import FOLDER, environment, make_parser, markdown, mean_and_each, metrics_in, read, settings, show_or_run
from tasks import load_task
from text_classification import evaluate, train
from torch.utils.data import DataLoader
from transformers import AutoTokenizer, DataCollatorWithPadding, set_seed

from peft_prune import PPruningConfig, StructuredPruningConfig, calibrate


RESULTS = FOLDER / "structured_accuracy.jsonl"
KEPT = (0.7, 0.5, 0.3)
STEPS = {"movies": 250, "stsb": 160}
METHODS: dict[str, Any] = {
    "loss, repair": lambda **f: StructuredPruningConfig(lambda_ffn=None, **f),  # heads and neurons in one list
    "loss, repair, more heads": lambda **f: StructuredPruningConfig(**f),  # the default of a classifier: λ = 5
    "activation, repair": lambda **f: StructuredPruningConfig(criterion="activation", lambda_ffn=None, **f),
    "P-pruning": lambda **f: PPruningConfig(**f),
    "P-pruning, repair": lambda **f: PPruningConfig(repair=True, **f),
    "magnitude": lambda **f: StructuredPruningConfig(criterion="magnitude", repair=False, **f),
    "random": lambda **f: StructuredPruningConfig(criterion="random", repair=False, **f),
}
# which are fine-tuned after pruning, too
FIRST = ("loss, repair, more heads", "loss, repair", "P-pruning, repair", "P-pruning")
BEFORE, AFTER = "pruned first", "pruned at the end"


class Bench:
    """A task with its seed: trains, scores and prunes."""

    def __init__(self, args: argparse.Namespace, folder: str) -> None:
        self.args, self.folder = args, folder
        self.tokenizer = AutoTokenizer.from_pretrained(minilm_path())
        self.train_set, self.eval_set, self.base, self.metrics = load_task(args.task, self.tokenizer)
        columns = [name for name in self.train_set.column_names if name != "length"]
        rows = self.train_set.shuffle(seed=args.seed).select_columns(columns)
        self.loader = DataLoader(rows, 32, collate_fn=DataCollatorWithPadding(self.tokenizer))

    def trained(self, model: Any, lr: float) -> dict[str, float]:
        set_seed(self.args.seed)
        trainer = train(
            model, self.tokenizer, self.train_set, self.eval_set, lr=lr, steps=self.args.steps, seed=self.args.seed,
            output_dir=self.folder, use_cpu=True, quiet=True, compute_metrics=self.metrics,
            bf16=self.args.dtype == "bfloat16",
        )  # fmt: skip
        return metrics_in(trainer.evaluate())

    def pruned(self, model: Any, method: str, keep: float) -> tuple[Any, float]:
        """A smaller copy of a model, and the CPU seconds that took."""
        fields = {
            "task_type": "SEQ_CLS", "keep_ratio": keep, "sequence_length": 32, "seed": self.args.seed,
            "num_samples": self.args.samples,
        }  # fmt: skip
        start = time.process_time()
        model = get_peft_model(copy.deepcopy(model), METHODS[method](**fields))
        calibrate(model, self.loader)
        return model.merge_and_unload(), time.process_time() - start

    def score(self, model: Any) -> dict[str, float]:
        return metrics_in(evaluate(model, self.tokenizer, self.eval_set, self.metrics, self.folder))


def run(args: argparse.Namespace) -> dict[str, Any]:
    args.steps = args.steps or STEPS[args.task]
    set_seed(args.seed)
    scores: dict[str, dict[str, float]] = {}
    seconds: dict[str, int] = {}

    def note(name: str, found: dict[str, float]) -> None:
        scores[name] = found
        print(name, found, flush=True)

    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(args, folder)
        lora = LoraConfig(task_type="SEQ_CLS", r=8, lora_alpha=16)
        if args.methods == list(METHODS):
            note("LoRA", bench.trained(get_peft_model(copy.deepcopy(bench.base), lora), 10 * args.lr))
        for keep in KEPT:
            for method in [method for method in FIRST if method in args.methods]:
                smaller, seconds[f"{method} {keep:.0%}"] = bench.pruned(bench.base, method, keep)
                note(f"{BEFORE}: {method} {keep:.0%}", bench.trained(smaller, args.lr))
        note("dense", bench.trained(bench.base, args.lr))
        for keep in KEPT:
            for method in args.methods:
                smaller, _ = bench.pruned(bench.base, method, keep)
                note(f"{AFTER}: {method} {keep:.0%}", bench.score(smaller))
    return settings(args) | {"scores": scores, "calibration_cpu_seconds": seconds} | environment()


def by_seed(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """A row for each seed, with the scores of all runs of it."""
    merged: dict[int, dict[str, Any]] = {}
    for row in rows:
        known = merged.setdefault(row["seed"], row | {"scores": {}})
        known["scores"] = row["scores"] | known["scores"]
    return list(merged.values())


def table(path: Path) -> str:
    """A row for each way and method, a column for each share of the FLOPs: mean, and each seed's score."""
    texts = []
    for task, metric in (("movies", "accuracy"), ("stsb", "pearson")):
        rows = by_seed([row for row in read(path) if row["task"] == task])
        if not rows:
            continue

        def cell(name: str, rows: list[dict] = rows, metric: str = metric) -> str:
            return mean_and_each(
                [row | {"scores": row["scores"][name]} for row in rows if name in row["scores"]], metric
            )

        lines = [
            [when, method, *(cell(f"{when}: {method} {keep:.0%}") for keep in KEPT)]
            for when, methods in ((AFTER, METHODS), (BEFORE, FIRST))
            for method in methods
        ]
        head = ["", "method", *(f"{keep:.0%} of the FLOPs" for keep in KEPT)]
        texts.append(f"{task}, {metric}: dense {cell('dense')}; LoRA {cell('LoRA')}\n\n" + markdown(head, lines))
    return "\n\n".join(texts)


if __name__ == "__main__":
    parser = make_parser(__doc__, RESULTS, table=True)
    parser.add_argument("--task", choices=list(STEPS), default="movies")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--methods", nargs="+", choices=list(METHODS), default=list(METHODS))
    parser.add_argument("--steps", type=int, help="of 32; by default 250 and 160")
    parser.add_argument("--lr", type=float, default=1e-4)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32", help="of products in training")
    parser.add_argument("--samples", type=int, default=256, help="sentences of the calibration")
    show_or_run(parser.parse_args(), table, run)
