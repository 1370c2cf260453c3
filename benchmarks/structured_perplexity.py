"""Structured pruning of SmolLM2-135M without training: perplexity of the smaller model.

    python benchmarks/structured_perplexity.py
    python benchmarks/structured_perplexity.py --method "loss, repair" --keep 0.8
    python benchmarks/structured_perplexity.py --table

Without `--method`, every row of `GRID` is run that the results lack, one after the other, each in a process of its own;
it can be stopped and started again. `--keep` is the share of the FLOPs of attentions and feed-forward networks, counted
at 512 tokens. Calibration and texts are those of `language_model.py`. What is measured is the model that
`merge_and_unload()` returns, so heads and neurons are really gone; FLAP with its biases is masked by hand.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from flap import flap
from language_model import LENGTH, add_arguments, calibration_windows, load, mean_ratio, peak_memory, perplexities
from peft import get_peft_model
from scaffold import FOLDER, append, environment, make_parser, markdown, mean, read, settings
from transformers import set_seed

from peft_prune import PPruningConfig, StructuredPruningConfig, calibrate, model_size
from peft_prune.layers.layer import pruning_layers


RESULTS = FOLDER / "structured_perplexity.jsonl"
LAYERS = 30  # of the dense model
METHODS: dict[str, Any] = {
    "loss, repair": lambda **f: StructuredPruningConfig(criterion="loss", **f),
    "loss, repair, uniform": lambda **f: StructuredPruningConfig(shapes="uniform", **f),
    "loss, repair, uniform, neurons only": lambda **f: StructuredPruningConfig(shapes="uniform", lambda_ffn=1e6, **f),
    "loss, repair, uniform 64": lambda **f: StructuredPruningConfig(shapes="uniform", multiple_of=64, **f),
    "loss, repair, multiples of 32": lambda **f: StructuredPruningConfig(multiple_of=32, **f),
    "loss": lambda **f: StructuredPruningConfig(criterion="loss", repair=False, **f),
    "activation, repair": lambda **f: StructuredPruningConfig(criterion="activation", **f),
    "activation": lambda **f: StructuredPruningConfig(criterion="activation", repair=False, **f),
    "magnitude, repair": lambda **f: StructuredPruningConfig(criterion="magnitude", **f),
    "magnitude": lambda **f: StructuredPruningConfig(criterion="magnitude", repair=False, **f),
    "random, repair": lambda **f: StructuredPruningConfig(criterion="random", **f),
    "layers by loss": lambda **f: StructuredPruningConfig(
        keep_layers=round(f["keep_ratio"] * LAYERS), layer_criterion="loss", **f
    ),
    "layers by block influence": lambda **f: StructuredPruningConfig(
        keep_layers=round(f["keep_ratio"] * LAYERS), layer_criterion="influence", **f
    ),
    "P-pruning, repair": lambda **f: PPruningConfig(repair=True, **f),
    "P-pruning": lambda **f: PPruningConfig(**f),
}
TWO_STEPS = "loss, repair, in two steps"  # half of the way, merged, and the other half from there
METHODS[TWO_STEPS] = METHODS["loss, repair"]
KEPT = (0.8, 0.9, 0.6)
# (method, keep, seed), the most important first
GRID = [("dense", 1.0, 0)] + [(method, keep, 0) for keep in KEPT for method in (*METHODS, "FLAP")]
GRID += [("loss, repair", 0.8, seed) for seed in (1, 2)]


def pruned(model: Any, method: str, keep: float, windows: Any, seed: int) -> tuple[Any, dict[str, float]]:
    """The model with a calibrated adapter, and what that keeps."""
    fields = {"task_type": "CAUSAL_LM", "keep_ratio": keep, "sequence_length": LENGTH, "seed": seed}
    model = get_peft_model(model, METHODS[method](**fields, num_samples=len(windows)))
    return model, calibrate(model, [{"input_ids": rows} for rows in windows.split(4)])


def run(args: argparse.Namespace) -> dict[str, Any]:
    set_seed(args.seed)
    model, tokenizer = load()
    found: dict[str, Any] = {}
    if args.method == "FLAP":
        windows = calibration_windows(tokenizer, args)
        start = time.process_time()
        found["shares"] = flap(model, [{"input_ids": rows} for rows in windows.split(4)], args.keep, LENGTH)
        found |= {"calibration_cpu_seconds": round(time.process_time() - start), "peak_gb": round(peak_memory(), 2)}
        found |= {"adapter_bytes": 0, "parameters": model_size(model).parameters - found["shares"].pop("removed")}
    elif args.method != "dense":
        windows = calibration_windows(tokenizer, args)
        start = time.process_time()
        if args.method == TWO_STEPS:
            model, _ = pruned(model, args.method, args.keep**0.5, windows, args.seed)
            model = model.merge_and_unload()
        keep = args.keep**0.5 if args.method == TWO_STEPS else args.keep
        model, found["shares"] = pruned(model, args.method, keep, windows, args.seed)
        found |= {"calibration_cpu_seconds": round(time.process_time() - start), "peak_gb": round(peak_memory(), 2)}
        found["adapter_bytes"] = sum(
            tensor.numel() * tensor.element_size()
            for layer in pruning_layers(model)
            for kind in ("mask", "values")
            for tensor in layer.held(kind).values()
        )
        model = model.merge_and_unload()
    found.setdefault("parameters", model_size(model, LENGTH).parameters)
    return settings(args) | found | perplexities(model, tokenizer, args.windows) | environment()


def missing(args: argparse.Namespace) -> list[tuple[str, float, int]]:
    """Rows of the grid that were not run with these windows and this text."""
    same = ("windows", "calibration", "text")
    done = {
        (row["method"], row["keep"], row["seed"])
        for row in read(args.results)
        if all(row[key] == getattr(args, key) for key in same)
    }
    return [row for row in GRID if row not in done]


def run_all(args: argparse.Namespace) -> None:
    for method, keep, seed in missing(args):
        command = [sys.executable, __file__, "--method", method, "--keep", str(keep), "--seed", str(seed)]
        for key in ("results", "windows", "calibration", "text"):
            command += [f"--{key}", str(getattr(args, key))]
        subprocess.run(command, check=True)


def table(path: Path) -> str:
    """Mean over calibration seeds, in brackets their number; ratios to dense; CPU seconds and memory of calibration."""
    rows = read(path)
    dense = next(row for row in rows if row["method"] == "dense")
    kinds: dict[tuple[float, str, str], list[dict]] = {}  # share kept, what was calibrated on, method
    for row in rows:
        if row["method"] != "dense":
            text = f"{row['text']}, {row['calibration']} windows"
            kinds.setdefault((-row["keep"], text, row["method"]), []).append(row)
    ordered = sorted(kinds.items(), key=lambda kind: (*kind[0][:2], mean([row["perplexity"] for row in kind[1]])))
    cells = [
        [
            f"{-keep:.0%}", text, method, f"{mean([row['perplexity'] for row in of]):,.1f} ({len(of)})",
            f"{mean([row['perplexity'] for row in of]) / dense['perplexity']:,.2f}",
            f"{mean([mean_ratio(row, dense) for row in of]):,.2f}", f"{of[0]['parameters'] / 1e6:.1f}",
            f"{of[0]['adapter_bytes'] / 1e6:.2f}", str(of[0]["calibration_cpu_seconds"]), str(of[0]["peak_gb"]),
        ]
        for (keep, text, method), of in ordered
    ]  # fmt: skip
    head = ["FLOPs kept", "calibration", "method", "WikiText-2 (seeds)", "÷ dense", "other texts ÷ dense"]
    head += ["parameters, M", "adapter, MB", "CPU s", "GB"]
    dense_row = f"dense: {dense['perplexity']:.1f}, {dense['parameters'] / 1e6:.1f} M parameters"
    return f"{dense_row}\n\n" + markdown(head, cells)


if __name__ == "__main__":
    parser = make_parser(__doc__, RESULTS, table=True)
    parser.add_argument("--method", choices=["dense", *METHODS, "FLAP"])
    parser.add_argument("--keep", type=float, default=1.0, help="share of the FLOPs that stays")
    add_arguments(parser)
    args = parser.parse_args()
    if args.table:
        print(table(args.results))
    elif args.method:
        append(args.results, run(args))
    else:
        run_all(args)
