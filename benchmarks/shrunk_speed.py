"""Whole-model speed of shrunk BERT-base against the dense one, side by side in one run.

    python benchmarks/shrunk_speed.py

BERT-base's shape with random weights, 128 tokens, heads and neurons removed at random to 70, 50, 30 and 10 % of the
FLOPs of attention and feed-forward (λ = 5). Every number is the dense model's time over the shrunk one's in the same
engine; the last columns of the table are over the dense model in eager fp32. CPU time on one thread, the median of
rounds that take all models in turn.
"""

from __future__ import annotations

import argparse
import gc
import os
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any


os.environ.setdefault("HF_HUB_OFFLINE", "1")

import numpy as np
import onnxruntime
import torch
from onnxruntime.quantization import QuantType, quantize_dynamic
from peft import get_peft_model
from scaffold import FOLDER, cpu_name, machine, make_parser, markdown, write
from torch import nn
from transformers import BertConfig, BertForSequenceClassification

from peft_prune import PPruningConfig, calibrate, model_size
from peft_prune.report import export_onnx


RESULTS = FOLDER / "shrunk_speed.json"
LENGTH = 128
ENGINES = ("eager fp32", "eager int8", "compiled fp32", "onnxruntime fp32", "onnxruntime int8")


def make_model(keep: float) -> nn.Module:
    torch.manual_seed(0)
    model = BertForSequenceClassification(BertConfig()).eval()
    if keep == 1.0:
        return model
    config = PPruningConfig(task_type="SEQ_CLS", keep_ratio=keep, criterion="random", sequence_length=LENGTH)
    peft_model = get_peft_model(model, config)
    calibrate(peft_model)
    return peft_model.merge_and_unload().eval()


def make_session(path: Path) -> Callable[[torch.Tensor], Any]:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])

    def call(ids: torch.Tensor) -> Any:
        values = ids.numpy()
        return session.run(None, {"input_ids": values, "attention_mask": np.ones_like(values)})

    return call


def make_callable(model: nn.Module, engine: str, folder: Path) -> Callable[[torch.Tensor], Any]:
    if engine.startswith("onnxruntime"):
        path = folder / "model.onnx"
        export_onnx(model, path)
        if engine.endswith("int8"):
            quantize_dynamic(path, folder / "int8.onnx", weight_type=QuantType.QInt8)
            path = folder / "int8.onnx"
        return make_session(path)
    if engine == "eager int8":
        model = torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, dtype=torch.qint8)
    if engine.startswith("compiled"):
        model = torch.compile(model)
    return lambda ids: model(input_ids=ids, attention_mask=torch.ones_like(ids))


def measure(calls: list[Callable[[torch.Tensor], Any]], ids: torch.Tensor, rounds: int) -> list[float]:
    seconds: list[list[float]] = [[] for _ in calls]
    with torch.no_grad():
        for call in calls:
            call(ids)
            call(ids)
        for _ in range(rounds):
            for times, call in zip(seconds, calls, strict=True):
                start = time.process_time()
                call(ids)
                times.append(time.process_time() - start)
    return [float(np.median(times)) for times in seconds]


def run(args: argparse.Namespace) -> dict:
    torch.set_num_threads(1)
    torch._dynamo.config.recompile_limit = 64  # one forward method, many shapes of it
    keeps = [1.0, 0.7, 0.5, 0.3, 0.1]
    times: dict[str, dict[int, list[float]]] = {}
    macs = [model_size(make_model(keep), LENGTH).macs for keep in keeps]
    for engine in args.engines:
        with tempfile.TemporaryDirectory() as scratch:
            calls = []
            for keep in keeps:
                folder = Path(scratch) / str(keep)
                folder.mkdir()
                calls.append(make_callable(make_model(keep), engine, folder))
            times[engine] = {
                batch: measure(calls, torch.randint(1000, 20000, (batch, LENGTH)), args.rounds)
                for batch in args.batches
            }
        print(engine, times[engine], flush=True)
        del calls
        torch.compiler.reset()
        gc.collect()
    return {
        "keep": keeps, "macs": macs, "seconds": times, "length": LENGTH, "threads": 1, "torch": torch.__version__,
        "onnxruntime": onnxruntime.__version__, "machine": machine(), "cpu": cpu_name(),
    }  # fmt: skip


def table(result: dict) -> str:
    keeps = result["keep"]
    head = [
        "engine",
        "batch",
        *(f"{keep:.0%}" for keep in keeps[1:]),
        "dense, over eager fp32",
        "30 %, over eager fp32",
    ]
    lines = []
    base = result["seconds"].get("eager fp32") or next(iter(result["seconds"].values()))
    for engine, batches in result["seconds"].items():
        for batch, seconds in batches.items():
            ratios = [f"{seconds[0] / s:.2f}" for s in seconds[1:]]
            eager = base[batch][0]
            lines.append([engine, str(batch), *ratios, f"{eager / seconds[0]:.2f}", f"{eager / seconds[3]:.2f}"])
    return markdown(head, lines)


if __name__ == "__main__":
    warnings.filterwarnings("ignore")
    parser = make_parser(__doc__, RESULTS)
    parser.add_argument("--engines", nargs="*", default=list(ENGINES))
    parser.add_argument("--batches", nargs="*", type=int, default=[1, 8])
    parser.add_argument("--rounds", type=int, default=9)
    arguments = parser.parse_args()
    outcome = run(arguments)
    write(arguments.results, outcome, indent=None)
    print(table(outcome))
