"""Peak memory and time of `calibrate` for a random Llama of 1.1 billion parameters, and a formula for larger ones.

The model has TinyLlama's shape (22 blocks, width 2048) and random weights in bfloat16. Each run has its own process.

    python benchmarks/calibration_memory.py                          # runs what the results lack; eighteen CPU minutes
    python benchmarks/calibration_memory.py --table

"memory" calibrates all blocks on a little text; "time" the first two on more, which gives a block's time per token.
What a process occupies at most also depends on its allocator, which keeps some of what is freed: one run gives it back.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch
from peft import get_peft_model
from scaffold import FOLDER, cpu_name, environment, make_parser, markdown, write
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.initialization import no_init_weights

from peft_prune import SparseGPTConfig, WandaConfig, calibrate


RESULTS = FOLDER / "calibration_memory.json"
GB = 1e9
METHODS = {
    "Wanda": lambda **f: WandaConfig(refine=None, **f),
    "SparseGPT": lambda **f: SparseGPTConfig(solver="sparsegpt", **f),
}
RUNS = {  # blocks calibrated, windows, tokens of a window
    "time, little text": (2, 1, 512),
    "time, more text": (2, 4, 512),
    "memory": (22, 2, 64),
    "memory given back": (22, 2, 16),
}
GIVES_BACK = {"MALLOC_MMAP_THRESHOLD_": "65536"}  # for the last of these: glibc returns what is freed to the system


@dataclass(frozen=True)
class Shape:
    """A Llama, in numbers."""

    width: int
    inner: int
    blocks: int
    heads: int
    key_value_heads: int
    vocabulary: int = 32000
    tied: bool = False

    @property
    def matrices(self) -> list[tuple[int, int]]:
        """(out, in) of a block's matrices."""
        narrow = self.width * self.key_value_heads // self.heads
        attention = [(self.width, self.width), (narrow, self.width), (narrow, self.width), (self.width, self.width)]
        return [*attention, (self.inner, self.width), (self.inner, self.width), (self.width, self.inner)]

    @property
    def block_weights(self) -> int:
        return sum(rows * columns for rows, columns in self.matrices)

    @property
    def gram_numbers(self) -> int:
        """Numbers of a block's Gram matrices: queries, keys and values share one, gate and up another."""
        return 3 * self.width**2 + self.inner**2

    @property
    def solver_operations(self) -> int:
        """What the work of solvers grows with: a factor of each Gram matrix, and its product with the weight."""
        return sum(columns**2 * (columns + rows) for rows, columns in self.matrices)

    @property
    def weights(self) -> int:
        return self.blocks * self.block_weights + (1 if self.tied else 2) * self.vocabulary * self.width


SHAPES = {
    "1.1 B": Shape(2048, 5632, 22, 32, 4),
    "7 B": Shape(4096, 11008, 32, 32, 32),
    "70 B": Shape(8192, 28672, 80, 64, 8),
}


def parts(shape: Shape, method: str, windows: int, length: int, blocks: int | None = None) -> dict[str, float]:
    """The formula: bytes of what is in memory when it is most, in bfloat16, one window a batch, half of it removed."""
    pruned = (blocks or shape.blocks) * shape.block_weights
    found = {
        "model": 2 * shape.weights,
        "adapter": pruned / 8 + (0.5 * 2 * pruned if method == "SparseGPT" else 0),
        "one block, masked": 2 * shape.block_weights,
        "hidden states": 2 * windows * length * shape.width,
        "a window in the block": 4 * length * shape.inner + 2 * length * (3 * shape.inner + 8 * shape.width),
    }
    rows, columns = max(shape.matrices, key=lambda matrix: matrix[1])
    if method == "SparseGPT":
        found["Gram matrices"] = 4 * shape.gram_numbers
        found["choice"] = 4 * (3 * columns**2 + 4 * rows * columns)
    else:
        found["choice"] = 4 * 3 * rows * columns
    return found


# ------------------------------------------------------------------------ runs


def random_model(shape: Shape) -> Any:
    """The model in bfloat16, whose weights are drawn once."""
    config = LlamaConfig(
        hidden_size=shape.width, intermediate_size=shape.inner, num_hidden_layers=shape.blocks,
        num_attention_heads=shape.heads, num_key_value_heads=shape.key_value_heads, vocab_size=shape.vocabulary,
        max_position_embeddings=4096, dtype=torch.bfloat16,
    )  # fmt: skip
    torch.set_default_dtype(torch.bfloat16)
    with no_init_weights():
        model = LlamaForCausalLM(config).eval()
    torch.set_default_dtype(torch.float32)
    noise = torch.randn(1 << 22).bfloat16() * 0.02  # drawing each number takes longer than calibration
    for parameter in model.parameters():
        if parameter.dim() == 1:
            parameter.data.fill_(1)
            continue
        for part in parameter.data.view(-1).split(len(noise)):
            part.copy_(noise.roll(int(torch.randint(len(noise), (1,))))[: len(part)])
    return model


def measure(method: str, run: str) -> dict[str, Any]:
    """One calibration, in this process."""
    torch.manual_seed(0)
    torch.set_num_threads(1)
    blocks, windows, length = RUNS[run]
    model = random_model(SHAPES["1.1 B"])
    fields = {"task_type": "CAUSAL_LM", "sparsity": 0.5, "num_samples": windows}
    model = get_peft_model(model, METHODS[method](**fields, layers_to_transform=list(range(blocks))))
    held = psutil.Process().memory_info().rss
    text = [{"input_ids": torch.randint(0, 32000, (1, length))} for _ in range(windows)]
    start = time.process_time()
    shares = calibrate(model, text)
    seconds = time.process_time() - start
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {
        "method": method, "run": run, "blocks": blocks, "windows": windows, "length": length, "shares": shares,
        "seconds": round(seconds, 1), "model_gb": round(held / GB, 3), "peak_gb": round(peak / GB, 3),
    }  # fmt: skip


# ---------------------------------------------------------------------- report


def rates(rows: list[dict[str, Any]]) -> dict[str, float]:
    """Seconds of a block of the measured model: per token and pass, per token's Gram matrices, and for the solver.

    Each block is run twice, the last one once and without its last matrix; the first window once more.
    """
    seconds = {(r["method"], r["run"]): r["seconds"] for r in rows}
    little, more, whole, _ = RUNS
    blocks, _, length = RUNS[little]
    tokens = length * (RUNS[more][1] - RUNS[little][1])
    shape = SHAPES["1.1 B"]
    passes = 2 * blocks - 1 - shape.inner * shape.width / shape.block_weights
    slope = {method: (seconds[method, more] - seconds[method, little]) / tokens for method in METHODS}
    return {
        "forward": slope["Wanda"] / passes,
        "gram": max(0.0, (slope["SparseGPT"] - slope["Wanda"]) / blocks),  # less than what runs differ by
        "solver": (seconds["SparseGPT", whole] - seconds["Wanda", whole]) / RUNS[whole][0],
    }


def table(path: Path) -> str:
    """Measured beside the formula, then the formula for larger models."""
    result = json.loads(path.read_text())
    rows = result["runs"]
    measured = [
        [r["method"], r["run"], str(r["blocks"]), f"{r['windows']} × {r['length']}", f"{r['model_gb']:.2f}",
         f"{r['peak_gb']:.2f}", f"{formula(r):.2f}", f"{r['seconds']:.0f}"]
        for r in rows
    ]  # fmt: skip
    head = ["method", "run", "blocks", "text", "GB before", "GB at most", "GB by the formula", "CPU seconds"]
    names = list(parts(SHAPES["7 B"], "SparseGPT", 1, 1))
    larger = []
    for name, shape in SHAPES.items():
        for method in METHODS:
            found = parts(shape, method, 128, 2048)
            cells = [f"{found[part] / GB:.1f}" if part in found else "–" for part in names]
            larger.append([name, method, *cells, f"{sum(found.values()) / GB:.1f}", *effort(rows, method, shape)])
    return "\n\n".join(
        [
            markdown(head, measured),
            f"By the formula, for 128 windows of 2,048 tokens in bfloat16; hours of one thread of {result['cpu']}:",
            markdown(["model", "method", *names, "GB in all", "PFLOP", "CPU hours"], larger),
        ]
    )


def formula(row: dict[str, Any]) -> float:
    found = parts(SHAPES["1.1 B"], row["method"], row["windows"], row["length"], row["blocks"])
    return (sum(found.values()) - found["model"]) / GB + row["model_gb"]


def effort(rows: list[dict[str, Any]], method: str, shape: Shape) -> tuple[str, str]:
    """Operations of 128 windows of 2,048 tokens, and CPU hours by the rates of the measured model."""
    rate, base, tokens = rates(rows), SHAPES["1.1 B"], 128 * 2048
    operations = 2 * 2 * tokens * shape.block_weights
    seconds = 2 * tokens * rate["forward"] * shape.block_weights / base.block_weights
    if method == "SparseGPT":
        operations += 2 * tokens * shape.gram_numbers + 2 * shape.solver_operations
        seconds += tokens * rate["gram"] * shape.gram_numbers / base.gram_numbers
        seconds += rate["solver"] * shape.solver_operations / base.solver_operations
    return f"{shape.blocks * operations / 1e15:.1f}", f"{shape.blocks * seconds / 3600:.0f}"


def main(args: argparse.Namespace) -> None:
    if args.one:
        print(json.dumps(measure(*args.one)))
        return
    result = json.loads(args.results.read_text()) if args.results.exists() else {"runs": []}
    if not args.table:
        for run in RUNS:
            for method in METHODS if run != "memory given back" else ["Wanda"]:
                if not any((r["method"], r["run"]) == (method, run) for r in result["runs"]):
                    command = [sys.executable, __file__, "--one", method, run]
                    environ = os.environ | (GIVES_BACK if run == "memory given back" else {})
                    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env=environ)
                    result["runs"].append(json.loads(done.stdout.splitlines()[-1]))
                    result |= environment() | {"threads": 1, "cpu": cpu_name(), "dtype": "bfloat16"}
                    write(args.results, result)
    print(table(args.results))


if __name__ == "__main__":
    parser = make_parser(__doc__, RESULTS, table=True)
    parser.add_argument("--one", nargs=2, metavar=("METHOD", "RUN"), help="one run, in this process")
    main(parser.parse_args())
