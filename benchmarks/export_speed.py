"""Tokens per second of smaller language models over the dense one, in several engines, in one run.

    python benchmarks/export_speed.py --peer-python peer/bin/python   # without it, llama.cpp is left out
    python benchmarks/export_speed.py --peer-python peer/bin/python --engines "llama.cpp float16" --shapes "free, 32"
    python benchmarks/export_speed.py --table

SmolLM2-135M with 80 and 60 % of its FLOPs: with shapes "free", the same with neurons in multiples of 32, "uniform" with
neurons in multiples of 64, and without whole layers. Prefill: a prompt of 512 tokens. Decode: single tokens after it,
with a cache of keys and values. One engine after the other; in each, rounds take all models in turn, and of each model
the median counts. Wall time, so leave the machine alone. Every model is made as for use: calibrated, though without the
repair of its weights, which changes no shape. Matrices are float32, but int8 where an engine is called so, and float16
in llama.cpp, which has an environment of its own (see `gguf_peer.py`).
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
from gguf_peer import ask_llama_cpp
from language_model import LENGTH, as_tokens
from offline_data import smollm2_path, wikitext_2
from onnxruntime.quantization import QuantType, quantize_dynamic
from peft import get_peft_model
from scaffold import FOLDER, append, cpu_name, make_parser, markdown, read
from transformers import AutoModelForCausalLM, AutoTokenizer

from peft_prune import StructuredPruningConfig, calibrate, load_compact, model_size
from peft_prune.report import export_onnx, save_gguf


RESULTS = FOLDER / "export_speed.jsonl"
LLAMA_CPP = "llama.cpp float16"
ENGINES = ("transformers eager", "onnxruntime", "onnxruntime int8", LLAMA_CPP)
INT8 = {"per_channel": True, "op_types_to_quantize": ["MatMul"]}
LAYERS = 30
KEPT, SHAPES = (0.8, 0.6), {"free": 1, "free, 32": 32, "uniform": 64, "fewer layers": 1}  # multiples of neurons
Step = Callable[[np.ndarray, Any], Any]  # new tokens (1, n) and the past, `None` at first: the new past


def config_of(keep: float, shapes: str, samples: int) -> StructuredPruningConfig:
    how: dict[str, Any] = {"task_type": "CAUSAL_LM", "sequence_length": LENGTH, "num_samples": samples, "repair": False}
    if shapes == "fewer layers":
        return StructuredPruningConfig(
            keep_layers=round(keep * LAYERS), layer_criterion="influence", keep_ratio=1.0, **how
        )
    return StructuredPruningConfig(keep_ratio=keep, shapes=shapes.partition(",")[0], multiple_of=SHAPES[shapes], **how)


def make_models(folder: Path, args: argparse.Namespace) -> list[dict[str, Any]]:
    """Save a model of each setting, for each engine; what is known of each."""
    rows = []
    path = smollm2_path()
    tokens = as_tokens(AutoTokenizer.from_pretrained(path), wikitext_2("train")[:100_000])
    batches = [{"input_ids": row[None]} for row in tokens[: args.calibration * LENGTH].split(LENGTH)]
    for number, (keep, shapes) in enumerate(
        [(1.0, "free"), *((keep, shapes) for keep in KEPT for shapes in args.shapes)]
    ):
        model: Any = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
        if keep < 1:
            model = get_peft_model(model, config_of(keep, shapes, len(batches)))
            calibrate(model, batches)
            model = model.merge_and_unload().eval()
        save(model, folder / str(number), args)
        size = model_size(model, LENGTH)
        rows.append({"keep": keep, "shapes": shapes, "parameters": size.parameters, "macs": size.macs})
        print(rows[-1], flush=True)
    return rows


def save(model: Any, place: Path, args: argparse.Namespace) -> None:
    """Write what the engines read."""
    model.save_pretrained(place)
    if {"onnxruntime", "onnxruntime int8"} & set(args.engines):
        export_onnx(model, place / "model.onnx", use_cache=True)
    if "onnxruntime int8" in args.engines:
        quantize_dynamic(place / "model.onnx", place / "int8.onnx", weight_type=QuantType.QInt8, **INT8)
    if LLAMA_CPP in args.engines:
        save_gguf(model, place / "model.gguf")


def in_transformers(folder: Path, keep: float) -> Step:
    load: Any = AutoModelForCausalLM.from_pretrained if keep == 1 else load_compact
    model = load(folder, attn_implementation="eager").eval()

    def step(ids: np.ndarray, past: Any) -> Any:
        with torch.no_grad():
            return model(input_ids=torch.from_numpy(ids), past_key_values=past, use_cache=True).past_key_values

    return step


def in_onnxruntime(path: Path, threads: int) -> Step:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    inputs = session.get_inputs()[2:]  # after input_ids and attention_mask

    def step(ids: np.ndarray, past: Any) -> Any:
        past = past or [np.zeros((1, v.shape[1], 0, v.shape[3]), np.float32) for v in inputs]
        mask = np.ones((1, past[0].shape[2] + ids.shape[1]), np.int64)
        feed = {"input_ids": ids, "attention_mask": mask} | {v.name: t for v, t in zip(inputs, past, strict=True)}
        return session.run(None, feed)[1:]

    return step


def make_step(engine: str, folder: Path, keep: float, threads: int) -> Step:
    if engine == "transformers eager":
        return in_transformers(folder, keep)
    return in_onnxruntime(folder / ("int8.onnx" if engine.endswith("int8") else "model.onnx"), threads)


def measure(steps: list[Step], ids: np.ndarray, args: argparse.Namespace) -> list[dict[str, float]]:
    """Median seconds of the prompt, and of a token after it, of each model."""
    seconds: list[tuple[list[float], list[float]]] = [([], []) for _ in steps]
    for turn in range(args.rounds + 1):
        for (prefill, decode), step in zip(seconds, steps, strict=True):
            start = time.perf_counter()
            past = step(ids, None)
            middle = time.perf_counter()
            for _ in range(args.decode):
                past = step(ids[:, :1], past)
            if turn:  # the first round warms up
                prefill.append(middle - start)
                decode.append((time.perf_counter() - middle) / args.decode)
    return [{"prefill": float(np.median(a)), "decode": float(np.median(b))} for a, b in seconds]


def measure_engine(engine: str, threads: int, folder: Path, rows: list[dict], args: argparse.Namespace) -> list[dict]:
    ids = np.random.default_rng(0).integers(3, 80, (1, args.prompt))  # which tokens does not matter
    places = [folder / str(number) for number in range(len(rows))]
    if engine == LLAMA_CPP:
        job = {"files": [str(place / "model.gguf") for place in places], "prompt": ids[0].tolist(), "threads": threads}
        return ask_llama_cpp(args.peer_python, job | {"decode": args.decode, "rounds": args.rounds}, folder)
    torch.set_num_threads(threads)
    steps = [make_step(engine, place, row["keep"], threads) for place, row in zip(places, rows, strict=True)]
    found = measure(steps, ids, args)
    del steps
    gc.collect()
    return found


def run(args: argparse.Namespace) -> None:
    if not args.peer_python:
        args.engines = [engine for engine in args.engines if engine != LLAMA_CPP]
    began = time.strftime("%Y-%m-%d %H:%M")
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        rows = make_models(folder, args)
        print("measuring from here on", flush=True)
        for threads in args.threads:
            for engine in args.engines:
                for row, seconds in zip(rows, measure_engine(engine, threads, folder, rows, args), strict=True):
                    how = {"run": began, "engine": engine, "threads": threads, "prompt": args.prompt}
                    how |= row | seconds | {"rounds": args.rounds, "cpu": cpu_name(), "torch": torch.__version__}
                    append(args.results, how)


def table(path: Path) -> str:
    """Tokens per second, and how many times faster than the dense model in the same run."""
    rows = read(path)
    counts = sorted({row["threads"] for row in rows})
    cells: dict[tuple[str, ...], list[str]] = {}
    for row in sorted(rows, key=lambda row: (ENGINES.index(row["engine"]), -row["keep"], row["shapes"])):
        same = [other for other in rows if all(other[k] == row[k] for k in ("engine", "threads", "run"))]
        dense = next(other for other in same if other["keep"] == 1)
        what = f"dense, {row['run']}" if row["keep"] == 1 else f"{row['keep']:.0%}, {row['shapes']}"
        line = cells.setdefault((row["engine"], what, f"{row['parameters'] / 1e6:.1f}"), [])
        line.append(f"{row['prompt'] / row['prefill']:.0f} ({dense['prefill'] / row['prefill']:.2f})")
        line.append(f"{1 / row['decode']:.1f} ({dense['decode'] / row['decode']:.2f})")
    head = [f"{what}, {n} thread{'s' * (n > 1)}" for n in counts for what in ("prefill", "decode")]
    return markdown(["engine", "FLOPs kept", "M parameters", *head], [[*key, *line] for key, line in cells.items()])


if __name__ == "__main__":
    warnings.filterwarnings("ignore")
    parser = make_parser(__doc__, RESULTS, table=True)
    parser.add_argument("--engines", nargs="*", choices=ENGINES, default=list(ENGINES))
    parser.add_argument("--shapes", nargs="*", choices=list(SHAPES), default=list(SHAPES))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--prompt", type=int, default=LENGTH, help="tokens of the prompt")
    parser.add_argument("--decode", type=int, default=32, help="tokens after it")
    parser.add_argument("--calibration", type=int, default=8, help="windows of 512 tokens to calibrate on")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--peer-python", help="the Python that has llama-cpp-python")
    arguments = parser.parse_args()
    if not arguments.table:
        run(arguments)
    print(table(arguments.results))
