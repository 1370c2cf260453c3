"""P-pruning of MiniLM, then fine-tuning, on movie sentences and STS-B, beside random and magnitude choice.

One process runs one configuration and appends a JSON line; `--table` turns the lines into a table. A model is pruned
first, made smaller, and then fine-tuned like a dense one:

    python benchmarks/ppruning_accuracy.py --task movies --criterion similarity --keep 0.5 --seed 0
    python benchmarks/ppruning_accuracy.py --table
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from pathlib import Path


os.environ.setdefault("HF_HUB_OFFLINE", "1")
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples"))

from offline_data import minilm_path
from peft import get_peft_model
from scaffold import FOLDER, environment, make_parser, markdown, mean_and_each, metrics_in, read, settings, show_or_run
from tasks import load_task
from text_classification import train
from torch.utils.data import DataLoader
from transformers import AutoTokenizer, DataCollatorWithPadding, set_seed

from peft_prune import PPruningConfig, calibrate, model_size


RESULTS = FOLDER / "ppruning_accuracy.jsonl"


def parse() -> argparse.Namespace:
    parser = make_parser(__doc__, RESULTS, table=True)
    parser.add_argument("--task", choices=["movies", "stsb"], default="movies")
    parser.add_argument("--criterion", choices=["dense", "similarity", "magnitude", "random"])
    parser.add_argument("--keep", type=float, default=1.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=250)
    parser.add_argument("--lr", type=float, default=1e-4)
    parser.add_argument("--samples", type=int, default=640, help="examples of the calibration")
    parser.add_argument("--length", type=int, default=32, help="tokens for which FLOPs are counted")
    return parser.parse_args()


def run(args: argparse.Namespace) -> dict:
    set_seed(args.seed)
    tokenizer = AutoTokenizer.from_pretrained(minilm_path())
    train_set, eval_set, model, metrics = load_task(args.task, tokenizer)
    start, shares = time.process_time(), {"flops": 1.0, "heads": 1.0, "neurons": 1.0}
    seconds = 0.0
    if args.criterion != "dense":
        config = PPruningConfig(
            task_type="SEQ_CLS", keep_ratio=args.keep, criterion=args.criterion, sequence_length=args.length,
            num_samples=args.samples,
            seed=args.seed,
        )  # fmt: skip
        peft_model = get_peft_model(model, config)
        columns = [name for name in train_set.column_names if name != "length"]
        loader = DataLoader(
            train_set.shuffle(seed=args.seed).select_columns(columns), 32, collate_fn=DataCollatorWithPadding(tokenizer)
        )
        shares = calibrate(peft_model, loader)
        seconds = time.process_time() - start
        model = peft_model.merge_and_unload()
    set_seed(args.seed)
    with tempfile.TemporaryDirectory() as folder:
        trainer = train(
            model, tokenizer, train_set, eval_set, lr=args.lr, steps=args.steps, output_dir=folder, seed=args.seed,
            use_cpu=True, quiet=True, compute_metrics=metrics,
        )  # fmt: skip
        scores = metrics_in(trainer.evaluate())
    size = model_size(model, args.length)
    return settings(args) | {
        "scores": scores,
        "shares": shares, "calibration_cpu_seconds": seconds, "parameters": size.parameters, "macs": size.macs,
        "cpu_seconds": time.process_time() - start, **environment(),
    }  # fmt: skip


def table(path: Path) -> str:
    """Mean and each seed's score, a row for each share of the FLOPs and a column for each criterion."""
    rows, lines = read(path), []
    criteria = ["dense", "similarity", "magnitude", "random"]
    for task, metric in (("movies", "accuracy"), ("stsb", "pearson"), ("stsb", "spearman")):
        for keep in sorted({row["keep"] for row in rows if row["task"] == task}, reverse=True):
            cells = []
            for criterion in criteria:
                found = [r for r in rows if (r["task"], r["keep"], r["criterion"]) == (task, keep, criterion)]
                cells.append(mean_and_each(found, metric))
            lines.append([task, metric, f"{keep:.0%}", *cells])
    return markdown(["task", "metric", "FLOPs kept", *criteria], lines)


if __name__ == "__main__":
    show_or_run(parse(), table, run)
