"""One-shot pruning of SmolLM2-135M: perplexity on WikiText-2 without training.

    python benchmarks/one_shot_perplexity.py --method admm
    python benchmarks/one_shot_perplexity.py --table

All linear layers of the blocks are pruned. Calibration: the first `--calibration` windows of 512 tokens of WikiText-2's
training text. Perplexity: the first `--windows` windows of 512 tokens of its test text. "magnitude" is the one-line
baseline: the largest weights of each matrix stay.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from pathlib import Path
from typing import Any


os.environ.setdefault("HF_HUB_OFFLINE", "1")
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples"))

import torch
from offline_data import smollm2_path, wikitext_2
from peft import get_peft_model
from ppruning_perplexity import LENGTH, perplexity
from scaffold import FOLDER, make_parser, markdown, read, settings, show_or_run
from transformers import AutoModelForCausalLM, AutoTokenizer, set_seed

from peft_prune import SparseGPTConfig, WandaConfig, calibrate


RESULTS = FOLDER / "one_shot_perplexity.jsonl"
METHODS = {
    "wanda": lambda **f: WandaConfig(**f),
    "wanda, swaps": lambda **f: WandaConfig(refine="swaps", **f),
    "wanda, low rank": lambda **f: WandaConfig(update="low_rank", r=8, **f),
    "sparsegpt": lambda **f: SparseGPTConfig(solver="sparsegpt", **f),
    "admm": lambda **f: SparseGPTConfig(solver="admm", **f),
}

SHOWN = ("perplexity", "calibration_cpu_seconds")


def by_magnitude(model: Any, sparsity: float) -> None:
    """The one-line baseline."""
    with torch.no_grad():
        for name, module in model.named_modules():
            if isinstance(module, torch.nn.Linear) and ".layers." in f".{name}":
                size = module.weight.abs()
                kept = size > size.flatten().kthvalue(round(sparsity * size.numel())).values
                module.weight.mul_(kept)


def run(args: argparse.Namespace) -> dict:
    set_seed(args.seed)
    path = smollm2_path()
    tokenizer = AutoTokenizer.from_pretrained(path)
    model: Any = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    train = tokenizer(wikitext_2("train")[:1_000_000], return_tensors="pt")["input_ids"][0]
    test = tokenizer(wikitext_2("test")[:200_000], return_tensors="pt")["input_ids"][0]
    test = test[: args.windows * LENGTH].view(-1, LENGTH)
    result, seconds = settings(args), 0.0
    if args.method == "magnitude":
        by_magnitude(model, args.sparsity)
    elif args.method != "dense":
        how = {"granularity": args.granularity} if args.granularity else {"sparsity": args.sparsity}
        model = get_peft_model(model, METHODS[args.method](task_type="CAUSAL_LM", **how))
        windows = train[: args.calibration * LENGTH].view(-1, 1, LENGTH)
        start = time.process_time()
        result["shares"] = calibrate(model, [{"input_ids": row} for row in windows])
        seconds = time.process_time() - start
    return result | {
        "perplexity": perplexity(model, test), "calibration_cpu_seconds": round(seconds), "torch": torch.__version__,
    }  # fmt: skip


def table(path: Path) -> str:
    rows = sorted(read(path), key=lambda r: (r["granularity"] or "", r["perplexity"]))
    cells = [
        [r["method"], r["granularity"] or f"{r['sparsity']:.0%}", *(str(round(r[key], 1)) for key in SHOWN)]
        for r in rows
    ]
    return markdown(["method", "removed", "perplexity", "CPU seconds"], cells)


if __name__ == "__main__":
    parser = make_parser(__doc__, RESULTS, table=True)
    parser.add_argument("--method", choices=["dense", "magnitude", *METHODS])
    parser.add_argument("--sparsity", type=float, default=0.5)
    parser.add_argument("--granularity", help="n:m, such as 2:4, instead of a sparsity")
    parser.add_argument("--calibration", type=int, default=32)
    parser.add_argument("--windows", type=int, default=32)
    parser.add_argument("--seed", type=int, default=0)
    show_or_run(parser.parse_args(), table, run)
