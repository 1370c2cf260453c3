"""Bytes of a sparse SmolLM2-135M on disk: `save_sparse` beside the float16 checkpoint, and zstd of that.

    python benchmarks/sparse_checkpoint.py
    python benchmarks/sparse_checkpoint.py --table

The largest weights of each matrix of the blocks stay; embeddings are not pruned. Needs `pip install zstandard`.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import zstandard
from language_model import load
from safetensors.torch import save
from scaffold import FOLDER, append, environment, make_parser, markdown, read

from peft_prune import load_sparse, save_sparse


RESULTS = FOLDER / "sparse_checkpoint.jsonl"
SPARSITIES = (0.5, 0.7, 0.9)


def run(sparsity: float) -> dict[str, Any]:
    model, _ = load(torch.float16)
    with torch.no_grad():
        for name, module in model.named_modules():
            if isinstance(module, torch.nn.Linear) and ".layers." in f".{name}":
                size = module.weight.float().abs()
                module.weight.mul_(size > size.flatten().kthvalue(round(sparsity * size.numel())).values)
    with tempfile.TemporaryDirectory() as folder:
        start = time.process_time()
        found = save_sparse(model, Path(folder))
        saved = time.process_time()
        loaded = load_sparse(folder)
        seconds = {"save_cpu_seconds": saved - start, "load_cpu_seconds": time.process_time() - saved}
    weights = model.state_dict()
    assert all(torch.equal(tensor, weights[name]) for name, tensor in loaded.state_dict().items())
    distinct = {name: tensor for name, tensor in weights.items() if name != "lm_head.weight"}
    packed = len(zstandard.ZstdCompressor(level=3).compress(save(distinct)))
    return {"sparsity": sparsity, **found, "zstd_bytes": packed, **seconds, **environment()}


def table(path: Path) -> str:
    lines = [
        [
            f"{row['sparsity']:.0%}", *(f"{row[key] / 1e6:.1f}" for key in ("dense_bytes", "zstd_bytes", "bytes")),
            f"{row['bytes'] / row['dense_bytes']:.2f}",
            *(f"{row[key]:.1f}" for key in ("save_cpu_seconds", "load_cpu_seconds")),
        ]
        for row in read(path)
    ]  # fmt: skip
    head = ["weights removed", "float16, MB", "zstd of it", "save_sparse", "÷ float16", "save, CPU s", "load, CPU s"]
    return markdown(head, lines)


if __name__ == "__main__":
    args: argparse.Namespace = make_parser(__doc__, RESULTS, table=True).parse_args()
    if args.table:
        print(table(args.results))
    else:
        for sparsity in SPARSITIES:
            append(args.results, run(sparsity))
