"""P-pruning of MiniLM, then fine-tuning, on movie sentences and STS-B, beside random and magnitude choice.

One process runs one configuration and appends a JSON line; `--table` turns the lines into a table. A model is pruned
first, made smaller, and then fine-tuned like a dense one:

    python benchmarks/ppruning_accuracy.py --task movies --criterion similarity --keep 0.5 --seed 0
    python benchmarks/ppruning_accuracy.py --table
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from pathlib import Path


os.environ.setdefault("HF_HUB_OFFLINE", "1")
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples"))

import torch
from offline_data import minilm_path
from peft import get_peft_model
from tasks import load_task
from text_classification import train
from torch.utils.data import DataLoader
from transformers import AutoTokenizer, DataCollatorWithPadding, set_seed

from peft_prune import PPruningConfig, calibrate, model_size


RESULTS = Path(__file__).resolve().parent / "results" / "ppruning_accuracy.jsonl"


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", choices=["movies", "stsb"], default="movies")
    parser.add_argument("--criterion", choices=["dense", "similarity", "magnitude", "random"])
    parser.add_argument("--keep", type=float, default=1.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=250)
    parser.add_argument("--lr", type=float, default=1e-4)
    parser.add_argument("--samples", type=int, default=640, help="examples of the calibration")
    parser.add_argument("--length", type=int, default=32, help="tokens for which FLOPs are counted")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--table", action="store_true")
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
        scores = {k.removeprefix("eval_"): v for k, v in trainer.evaluate().items()}
    settings = {k: v for k, v in vars(args).items() if k not in ("results", "table")}
    size = model_size(model, args.length)
    return settings | {
        "scores": {k: scores[k] for k in ("accuracy", "pearson", "spearman") if k in scores},
        "shares": shares, "calibration_cpu_seconds": seconds, "parameters": size.parameters, "macs": size.macs,
        "cpu_seconds": time.process_time() - start, "torch": torch.__version__, "threads": torch.get_num_threads(),
    }  # fmt: skip


def table(path: Path) -> str:
    """Mean and each seed's score, a row for each share of the FLOPs and a column for each criterion."""
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    criteria = ["dense", "similarity", "magnitude", "random"]
    lines = ["| task | metric | FLOPs kept | " + " | ".join(criteria) + " |", "|---|---|---|" + "---|" * len(criteria)]
    for task, metric in (("movies", "accuracy"), ("stsb", "pearson"), ("stsb", "spearman")):
        for keep in sorted({row["keep"] for row in rows if row["task"] == task}, reverse=True):
            cells = []
            for criterion in criteria:
                found = [r for r in rows if (r["task"], r["keep"], r["criterion"]) == (task, keep, criterion)]
                scores = [row["scores"][metric] for row in sorted(found, key=lambda row: row["seed"])]
                each = ", ".join(f"{score:.1f}" for score in scores)
                cells.append(f"{sum(scores) / len(scores):.1f} ({each})" if scores else "–")
            lines.append(f"| {task} | {metric} | {keep:.0%} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    arguments = parse()
    if arguments.table:
        print(table(arguments.results))
    else:
        result = run(arguments)
        arguments.results.parent.mkdir(parents=True, exist_ok=True)
        with arguments.results.open("a") as file:
            file.write(json.dumps(result) + "\n")
        print(json.dumps(result))
