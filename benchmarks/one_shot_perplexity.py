"""One-shot pruning of SmolLM2-135M: perplexity without training, beside llm-compressor's.

    python benchmarks/one_shot_perplexity.py --method sparsegpt
    python benchmarks/one_shot_perplexity.py --method wanda --granularity 2:4 --text mixed
    python benchmarks/one_shot_perplexity.py --table

All linear layers of the blocks are pruned. Calibration: `--calibration` windows of 512 tokens of WikiText-2's training
text, or of a mixture (see `language_model.py`). Perplexity: the first `--windows` windows of 512 tokens of WikiText-2's
test text, and of three texts that no calibration sees. "magnitude" is the one-line baseline: the largest weights of
each matrix stay. llm-compressor has an environment of its own, see `one_shot_peer.py`; it gets the same windows.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from language_model import add_arguments, calibration_windows, load, mean_ratio, peak_memory, perplexities
from offline_data import smollm2_path
from peft import get_peft_model
from safetensors.torch import load_file, save_file
from scaffold import FOLDER, environment, make_parser, markdown, mean, read, settings, show_or_run
from transformers import set_seed

from peft_prune import SparseGPTConfig, WandaConfig, calibrate


RESULTS = FOLDER / "one_shot_perplexity.jsonl"
METHODS = {
    "wanda": lambda **f: WandaConfig(refine=None, **f),
    "wanda, swaps": lambda **f: WandaConfig(**f),
    "wanda, low rank": lambda **f: WandaConfig(refine=None, update="low_rank", r=8, **f),
    "wanda, swaps, low rank": lambda **f: WandaConfig(update="low_rank", r=8, **f),
    "wanda, swaps, owl": lambda **f: WandaConfig(allocation="owl", **f),
    "sparsegpt": lambda **f: SparseGPTConfig(solver="sparsegpt", **f),
    "sparsegpt, low rank": lambda **f: SparseGPTConfig(solver="sparsegpt", update="low_rank", r=8, **f),
    "admm": lambda **f: SparseGPTConfig(solver="admm", **f),
    "admm, owl": lambda **f: SparseGPTConfig(solver="admm", allocation="owl", **f),
    "admm, low rank": lambda **f: SparseGPTConfig(solver="admm", update="low_rank", r=8, **f),
}
PEER = "llm-compressor, "


def by_magnitude(model: Any, args: argparse.Namespace) -> None:
    """The one-line baseline."""
    with torch.no_grad():
        for name, module in model.named_modules():
            if isinstance(module, torch.nn.Linear) and ".layers." in f".{name}":
                size = module.weight.abs()
                if args.granularity:
                    n, m = map(int, args.granularity.split(":"))
                    groups = size.unflatten(1, (-1, m))
                    best = groups.topk(n, -1).indices
                    kept = torch.zeros_like(groups).scatter_(-1, best, 1.0).flatten(1)
                else:
                    kept = size > size.flatten().kthvalue(round(args.sparsity * size.numel())).values
                module.weight.mul_(kept)


def by_peer(model: Any, windows: torch.Tensor, args: argparse.Namespace) -> dict[str, Any]:
    """llm-compressor's weights, in place."""
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        save_file({"windows": windows}, place / "windows.safetensors")
        job = {
            "model": smollm2_path(), "windows": str(place / "windows.safetensors"),
            "method": args.method.removeprefix(PEER), "sparsity": 0.5 if args.granularity else args.sparsity,
            "pattern": args.granularity or "0:0", "save": str(place / "pruned.safetensors"),
        }  # fmt: skip
        (place / "job.json").write_text(json.dumps(job))
        script = Path(__file__).parent / "one_shot_peer.py"
        command = [args.peer_python, str(script), str(place / "job.json")]
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, cwd=folder)
        model.load_state_dict(load_file(place / "pruned.safetensors"), strict=False)
    return json.loads(done.stdout.splitlines()[-1])


def by_us(model: Any, windows: torch.Tensor, args: argparse.Namespace) -> tuple[Any, dict[str, Any]]:
    how = {"granularity": args.granularity} if args.granularity else {"sparsity": args.sparsity}
    model = get_peft_model(model, METHODS[args.method](task_type="CAUSAL_LM", num_samples=len(windows), **how))
    start = time.process_time()
    shares = calibrate(model, [{"input_ids": row[None]} for row in windows])
    seconds = time.process_time() - start
    return model, {"shares": shares, "calibration_cpu_seconds": round(seconds), "peak_gb": round(peak_memory(), 2)}


def run(args: argparse.Namespace) -> dict:
    set_seed(args.seed)
    model, tokenizer = load()
    windows = calibration_windows(tokenizer, args)
    found: dict[str, Any] = {}
    if args.method == "magnitude":
        by_magnitude(model, args)
    elif args.method.startswith(PEER):
        found = by_peer(model, windows, args)
    elif args.method != "dense":
        model, found = by_us(model, windows, args)
    return settings(args, "peer_python") | found | perplexities(model, tokenizer, args.windows) | environment()


def removed(row: dict) -> str:
    return row["granularity"] or f"{row['sparsity']:.0%}"


def table(path: Path) -> str:
    """Mean over calibration seeds, in brackets their number; ratios to dense; CPU seconds and memory of calibration."""
    rows = read(path)
    dense = next(row for row in rows if row["method"] == "dense")
    kinds: dict[tuple[str, str, str], list[dict]] = {}
    for row in rows:
        if row["method"] != "dense":
            kinds.setdefault((removed(row), row["text"], row["method"]), []).append(row)
    ordered = sorted(kinds.items(), key=lambda kind: (*kind[0][:2], mean([row["perplexity"] for row in kind[1]])))
    cells = [
        [
            *kind, f"{mean([row['perplexity'] for row in of]):.1f} ({len(of)})",
            f"{mean([row['perplexity'] for row in of]) / dense['perplexity']:.2f}",
            f"{mean([mean_ratio(row, dense) for row in of]):.2f}",
            *(f"{of[0][key]}" if key in of[0] else "–" for key in ("calibration_cpu_seconds", "peak_gb")),
        ]
        for kind, of in ordered
    ]  # fmt: skip
    head = ["removed", "calibration", "method", "WikiText-2 (seeds)", "÷ dense", "other texts ÷ dense", "CPU s", "GB"]
    return f"dense: {dense['perplexity']:.1f}\n\n" + markdown(head, cells)


if __name__ == "__main__":
    parser = make_parser(__doc__, RESULTS, table=True)
    peers = [PEER + "wanda", PEER + "sparsegpt"]
    parser.add_argument("--method", choices=["dense", "magnitude", *METHODS, *peers])
    parser.add_argument("--sparsity", type=float, default=0.5)
    parser.add_argument("--granularity", help="n:m, such as 2:4, instead of a sparsity")
    parser.add_argument("--peer-python", help="the Python that has llm-compressor")
    add_arguments(parser)
    show_or_run(parser.parse_args(), table, run)
