"""Recovery of SmolLM2-135M after structured pruning: a short LoRA, with and without the dense model as teacher.

    python benchmarks/structured_recovery.py
    python benchmarks/structured_recovery.py --keep 0.8 --steps 60 --alpha 0.5
    python benchmarks/structured_recovery.py --table

Functions of `examples/prune_llm.py`, figures of `language_model.py`. A step is 4 windows of 256 tokens; the LoRA has
rank 8 on all linear layers, at 1e-3. `--keep 1` prunes nothing: training on a text adapts to it, too, so the dense
model with the same LoRA is what a recovered one is compared with. Without `--keep`, every row of `GRID` is run that the
results lack; it can be stopped and started again, in the middle of a training, too.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from language_model import LENGTH, add_arguments, calibration_windows, load, mean_ratio, peak_memory, perplexities
from language_model import training_tokens as tokens_of
from prune_llm import prune, recover
from scaffold import FOLDER, append, environment, make_parser, markdown, read, settings
from transformers import set_seed

from peft_prune import load_compact, model_size, save_compact


RESULTS = FOLDER / "structured_recovery.jsonl"
ONE_SHOT = FOLDER / "one_shot_perplexity.jsonl"
WINDOW, CHARACTERS = 256, 2_000_000
# (keep, steps, alpha), the most important first
GRID = [(1.0, 60, 0.0), (0.8, 60, 0.5), (0.8, 0, 0.0), (0.8, 60, 0.0), (0.8, 60, 1.0)]


def training_rows(tokenizer: Any, args: argparse.Namespace) -> torch.Tensor:
    """Windows to train on: int64, shape (windows, 256); as many of each source."""
    sources = [tokens[: len(tokens) // WINDOW * WINDOW] for tokens in tokens_of(tokenizer, args.text, CHARACTERS)]
    shortest = min(map(len, sources))
    return torch.cat([source[:shortest].view(-1, WINDOW) for source in sources])


def pruned_model(model: Any, tokenizer: Any, args: argparse.Namespace) -> Any:
    """The smaller model, which all runs with the same calibration share."""
    name = f"{args.keep}-{args.calibration}-{args.text}-{args.seed}"
    folder, partial = args.work / f"pruned-{name}", args.work / f"partial-{name}"
    if not folder.exists():
        calibration = calibration_windows(tokenizer, args)
        save_compact(prune(model, calibration, keep_ratio=args.keep, sequence_length=LENGTH), partial)
        partial.rename(folder)
    return load_compact(folder)


def run(args: argparse.Namespace) -> dict[str, Any]:
    set_seed(args.seed)
    model, tokenizer = load()
    if args.keep < 1:
        model = pruned_model(model, tokenizer, args)
    start = time.process_time()
    if args.steps:
        name = "-".join(str(getattr(args, key)) for key in ("keep", "steps", "alpha", "calibration", "text", "seed"))
        teacher = load()[0] if args.alpha else None
        rows, bf16 = training_rows(tokenizer, args), args.dtype == "bfloat16"
        model = recover(model, rows, args.work / name, teacher, args.alpha, args.steps, seed=args.seed, bf16=bf16)
    found = {"tokens": args.steps * 4 * WINDOW, "training_cpu_seconds": round(time.process_time() - start)}
    found |= {"parameters": model_size(model, LENGTH).parameters, "peak_gb": round(peak_memory(), 2)}
    return settings(args, "work") | found | perplexities(model, tokenizer, args.windows) | environment()


def run_all(args: argparse.Namespace) -> None:
    same = ("windows", "calibration", "text", "seed")
    rows = [row for row in read(args.results) if all(row[key] == getattr(args, key) for key in same)]
    done = {(row["keep"], row["steps"], row["alpha"]) for row in rows}
    for keep, steps, alpha in [row for row in GRID if row not in done]:
        command = [sys.executable, __file__, "--keep", str(keep), "--steps", str(steps), "--alpha", str(alpha)]
        for key in ("results", "work", "dtype", *same):
            command += [f"--{key}", str(getattr(args, key))]
        subprocess.run(command, check=True)


def table(path: Path) -> str:
    """Perplexities, and ratios to the dense model with and without the same LoRA."""
    rows = read(path)
    dense = next(row for row in read(ONE_SHOT) if row["method"] == "dense")
    cells = []
    for row in sorted(rows, key=lambda row: (-row["keep"], row["text"], row["steps"], row["alpha"])):
        same = [r for r in rows if r["keep"] == 1 and (r["steps"], r["text"]) == (row["steps"], row["text"])]
        cells.append(
            [f"{row['keep']:.0%}", f"{row['steps']} steps" if row["steps"] else "none",
             f"{row['alpha']:g}" if row["steps"] else "–", row["text"], f"{row['parameters'] / 1e6:.1f}",
             f"{row['perplexity']:.1f}", f"{row['perplexity'] / dense['perplexity']:.2f}",
             f"{row['perplexity'] / same[0]['perplexity']:.2f}" if same else "–", f"{mean_ratio(row, dense):.2f}",
             str(row["training_cpu_seconds"]), str(row["peak_gb"])]
        )  # fmt: skip
    head = ["FLOPs kept", "LoRA", "weight of the teacher", "text", "parameters, M", "WikiText-2", "÷ dense"]
    dense_row = f"dense, without a LoRA: {dense['perplexity']:.1f}"
    return f"{dense_row}\n\n" + markdown([*head, "÷ dense with that LoRA", "other texts ÷ dense", "CPU s", "GB"], cells)


if __name__ == "__main__":
    parser = make_parser(__doc__, RESULTS, table=True)
    parser.add_argument("--keep", type=float, help="share of the FLOPs that stays; 1: nothing is pruned")
    parser.add_argument("--steps", type=int, default=60, help="of the LoRA; 0: none")
    parser.add_argument("--alpha", type=float, default=0.0, help="weight of the dense model as teacher")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32", help="of products in training")
    parser.add_argument("--work", type=Path, default=Path("runs/structured_recovery"), help="checkpoints")
    add_arguments(parser)
    arguments = parser.parse_args()
    if arguments.table:
        print(table(arguments.results))
    elif arguments.keep is not None:
        append(arguments.results, run(arguments))
    else:
        run_all(arguments)
