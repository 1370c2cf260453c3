"""Tokens per second of smaller language models over the dense one, in Transformers and onnxruntime, in one run.

    python benchmarks/export_speed.py
    python benchmarks/export_speed.py --table

SmolLM2-135M with 80 and 60 % of its FLOPs, with shapes "free" and "uniform" (neurons in multiples of 64). Prefill: a
prompt of 512 tokens. Decode: single tokens after it, with a cache of keys and values. One engine after the other; in
each, rounds take all models in turn, and of each model the median counts. CPU time on one thread. Every model is made
as for use: calibrated, though without the repair of its weights, which changes no shape.
"""

from __future__ import annotations

import argparse
import gc
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import torch
from language_model import LENGTH, as_tokens
from offline_data import smollm2_path, wikitext_2
from onnxruntime.quantization import QuantType, quantize_dynamic
from peft import get_peft_model
from scaffold import FOLDER, append, cpu_name, environment, make_parser, markdown, read
from transformers import AutoModelForCausalLM, AutoTokenizer

from peft_prune import StructuredPruningConfig, calibrate, load_compact, model_size
from peft_prune.report import export_onnx


RESULTS = FOLDER / "export_speed.jsonl"
ENGINES = ("transformers eager", "onnxruntime", "onnxruntime int8")
INT8 = {"per_channel": True, "op_types_to_quantize": ["MatMul"]}
SETTINGS = [(1.0, "free", 1), *((keep, *how) for keep in (0.8, 0.6) for how in (("free", 1), ("uniform", 64)))]
Step = Callable[[np.ndarray, Any], Any]  # new tokens (1, n) and the past, `None` at first: the new past


def make_models(folder: Path, args: argparse.Namespace) -> list[dict[str, Any]]:
    """Save a model of each setting, for Transformers and for onnxruntime; what is known of each."""
    rows = []
    path = smollm2_path()
    tokens = as_tokens(AutoTokenizer.from_pretrained(path), wikitext_2("train")[:100_000])
    batches = [{"input_ids": row[None]} for row in tokens[: args.calibration * LENGTH].split(LENGTH)]
    for number, (keep, shapes, multiple) in enumerate(SETTINGS):
        more = {"num_hidden_layers": args.layers} if args.layers else {}
        model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, **more).eval()
        if keep < 1:
            config = StructuredPruningConfig(
                task_type="CAUSAL_LM", keep_ratio=keep, shapes=shapes, multiple_of=multiple, repair=False,
                sequence_length=LENGTH, num_samples=len(batches),
            )  # fmt: skip
            peft_model = get_peft_model(model, config)
            calibrate(peft_model, batches)
            model = peft_model.merge_and_unload().eval()
        place = folder / str(number)
        model.save_pretrained(place)
        export_onnx(model, place / "model.onnx", use_cache=True)
        if "onnxruntime int8" in args.engines:
            quantize_dynamic(place / "model.onnx", place / "int8.onnx", weight_type=QuantType.QInt8, **INT8)
        size = model_size(model, LENGTH)
        rows.append({"keep": keep, "shapes": shapes, "multiple_of": multiple, "parameters": size.parameters})
        rows[-1] |= {"macs": size.macs, "bytes": {file.name: file.stat().st_size for file in place.glob("*.onnx")}}
        print(rows[-1], flush=True)
    return rows


def in_transformers(folder: Path, keep: float) -> Step:
    load: Any = AutoModelForCausalLM.from_pretrained if keep == 1 else load_compact
    model = load(folder, attn_implementation="eager").eval()

    def step(ids: np.ndarray, past: Any) -> Any:
        with torch.no_grad():
            return model(input_ids=torch.from_numpy(ids), past_key_values=past, use_cache=True).past_key_values

    return step


def in_onnxruntime(path: Path) -> Step:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    inputs = session.get_inputs()[2:]  # after input_ids and attention_mask

    def step(ids: np.ndarray, past: Any) -> Any:
        past = past or [np.zeros((1, v.shape[1], 0, v.shape[3]), np.float32) for v in inputs]
        mask = np.ones((1, past[0].shape[2] + ids.shape[1]), np.int64)
        feed = {"input_ids": ids, "attention_mask": mask} | {v.name: t for v, t in zip(inputs, past, strict=True)}
        return session.run(None, feed)[1:]

    return step


def make_step(engine: str, folder: Path, keep: float) -> Step:
    if engine == "transformers eager":
        return in_transformers(folder, keep)
    return in_onnxruntime(folder / ("int8.onnx" if engine.endswith("int8") else "model.onnx"))


def measure(steps: list[Step], ids: np.ndarray, args: argparse.Namespace) -> list[dict[str, float]]:
    """Median CPU seconds of the prompt, and of a token after it, of each model."""
    seconds: list[tuple[list[float], list[float]]] = [([], []) for _ in steps]
    for turn in range(args.rounds + 1):
        for (prefill, decode), step in zip(seconds, steps, strict=True):
            start = time.process_time()
            past = step(ids, None)
            middle = time.process_time()
            for _ in range(args.decode):
                past = step(ids[:, :1], past)
            if turn:  # the first round warms up
                prefill.append(middle - start)
                decode.append((time.process_time() - middle) / args.decode)
    return [{"prefill": float(np.median(a)), "decode": float(np.median(b))} for a, b in seconds]


def run(args: argparse.Namespace) -> None:
    torch.set_num_threads(1)
    began = time.strftime("%Y-%m-%d %H:%M")
    ids = np.random.default_rng(0).integers(3, 80, (1, args.prompt))  # which tokens does not matter
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        rows = make_models(folder, args)
        for engine in args.engines:
            steps = [make_step(engine, folder / str(number), row["keep"]) for number, row in enumerate(rows)]
            for row, seconds in zip(rows, measure(steps, ids, args), strict=True):
                how = {"run": began, "engine": engine, "prompt": args.prompt, "layers": args.layers}
                append(args.results, how | row | seconds | {"rounds": args.rounds, "cpu": cpu_name()} | environment())
            del steps
            gc.collect()


def table(path: Path) -> str:
    """Of the last run: tokens per second, and how many times faster than the dense model in the same engine."""
    rows = read(path)
    rows = [row for row in rows if row["run"] == rows[-1]["run"]]
    lines = []
    for row in rows:
        dense = next(other for other in rows if other["engine"] == row["engine"] and other["keep"] == 1)
        what = "dense" if row["keep"] == 1 else f"{row['keep']:.0%}, {row['shapes']}"
        what += f", multiples of {row['multiple_of']}" if row["multiple_of"] > 1 else ""
        cells = [f"{row['prompt'] / row['prefill']:.0f} ({dense['prefill'] / row['prefill']:.2f})"]
        cells += [f"{1 / row['decode']:.1f} ({dense['decode'] / row['decode']:.2f})"]
        lines.append([row["engine"], what, f"{row['parameters'] / 1e6:.1f}", *cells])
    return markdown(["engine", "FLOPs kept", "M parameters", "prefill, tokens/s", "decode, tokens/s"], lines)


if __name__ == "__main__":
    warnings.filterwarnings("ignore")
    parser = make_parser(__doc__, RESULTS, table=True)
    parser.add_argument("--engines", nargs="*", choices=ENGINES, default=list(ENGINES))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--prompt", type=int, default=LENGTH, help="tokens of the prompt")
    parser.add_argument("--decode", type=int, default=32, help="tokens after it")
    parser.add_argument("--calibration", type=int, default=8, help="windows of 512 tokens to calibrate on")
    parser.add_argument("--layers", type=int, help="only the first layers of the model, to try the script")
    arguments = parser.parse_args()
    if not arguments.table:
        run(arguments)
    print(table(arguments.results))
