"""Whole-model speed of pruned BERT-base with sparse kernels over the same model dense.

    python benchmarks/sparse_inference.py
    python benchmarks/sparse_inference.py --add --length 1 --batches 1 --pairs 25 --sparsities 0.8 0.9 0.95 0.97
    python benchmarks/sparse_inference.py --add --threads 2 --batches 1 --pairs 15 --sparsities 0.9 0.95 0.97
    python benchmarks/sparse_inference.py --table --plot docs/images/sparse_inference.png

BERT-base's shape, random weights, the same share of random zeros in each linear layer of the encoder, float32, one
thread unless told otherwise. `use_sparse_kernels` chooses the forms for the number of tokens; then passes of the two
models alternate in one process. A ratio is that of the CPU times of two passes in a row (with several threads of the
wall clock); the table has the median. `all csr` is every layer of the encoder as CSR, without a choice.
"""

from __future__ import annotations

import argparse
import copy
import json
import platform
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from scaffold import FOLDER, cpu_name, make_parser, markdown, write
from torch import nn
from transformers import BertConfig, BertModel
from transformers import __version__ as transformers_version

from peft_prune import use_sparse_kernels
from peft_prune.inference import SparseLinear
from peft_prune.inference.csr import CSRKernel


RESULTS = FOLDER / "sparse_inference.json"
LENGTH = 128
SPARSITIES = (0.5, 0.8, 0.9, 0.95, 0.97, 0.99)


def seconds(call: Any) -> float:
    """CPU time, which other work disturbs least; of several threads only the wall clock says how long they take."""
    clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
    start = clock()
    call()
    return clock() - start


def cut(model: nn.Module, sparsity: float) -> None:
    """Random zeros in the linear layers of the encoder."""
    for layer in model.encoder.modules():  # type: ignore[union-attr, operator]
        if isinstance(layer, nn.Linear):
            layer.weight.data *= torch.rand_like(layer.weight) >= sparsity


def all_csr(model: nn.Module) -> None:
    for name, layer in list(model.encoder.named_modules()):  # type: ignore[union-attr, operator]
        if isinstance(layer, nn.Linear):
            parent, _, last = name.rpartition(".")
            sparse = SparseLinear(layer, CSRKernel(layer.weight))
            setattr(model.encoder.get_submodule(parent), last, sparse)  # type: ignore[union-attr, operator]


def measure(sparsity: float, batch: int, length: int, pairs: int) -> dict[str, Any]:
    torch.manual_seed(0)
    dense: Any = BertModel(BertConfig()).eval()
    cut(dense, sparsity)
    chosen, csr = copy.deepcopy(dense), copy.deepcopy(dense)
    start = time.process_time()
    report = use_sparse_kernels(chosen, tokens=batch * length, timer=seconds)
    choosing = time.process_time() - start
    all_csr(csr)
    ids = torch.randint(5, 30000, (batch, length))
    expected, got = dense(ids).last_hidden_state, chosen(ids).last_hidden_state
    csr(ids)
    ratios: dict[str, list[float]] = {"chosen": [], "all csr": []}
    for _ in range(pairs):
        for name, model in (("chosen", chosen), ("all csr", csr)):
            ratios[name].append(seconds(lambda: dense(ids)) / seconds(lambda model=model: model(ids)))
    forms = {row.form: sum(r.form == row.form for r in report) for row in report}
    row = {"sparsity": sparsity, "batch": batch, "length": length, "threads": torch.get_num_threads()}
    row |= {"forms": forms, "choosing_seconds": choosing}
    row["error"] = float((expected - got).abs().max())
    return row | {"speed_up": {k: statistics.median(v) for k, v in ratios.items()}, "ratios": ratios}


def table(result: dict[str, Any]) -> str:
    head = (
        "sparsity",
        "batch",
        "threads",
        "speed-up, median",
        "lowest, highest pair",
        "forms of the 73 layers",
        "all CSR",
    )
    lines = []
    order = ("threads", "batch", "sparsity")
    for row in sorted(result["rows"], key=lambda row: (-row["length"], *(row[key] for key in order))):
        ratios, speed = row["ratios"]["chosen"], row["speed_up"]
        forms = ", ".join(f"{n} {form}" for form, n in sorted(row["forms"].items()))
        cells = [f"{row['sparsity']:.0%}", f"{row['batch']} × {row['length']}", str(row["threads"])]
        cells += [f"{speed['chosen']:.2f}", f"{min(ratios):.2f}, {max(ratios):.2f}", forms, f"{speed['all csr']:.2f}"]
        lines.append(cells)
    return markdown(head, lines)


def plot(result: dict[str, Any], path: Path) -> None:
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(6, 3.6), layout="constrained")
    for batch in sorted({row["batch"] for row in result["rows"]}):
        shown = {"batch": batch, "length": LENGTH, "threads": 1}
        rows = [row for row in result["rows"] if shown.items() <= row.items()]
        rows.sort(key=lambda row: row["sparsity"])
        labels = [f"{row['sparsity']:.0%}" for row in rows]
        (line,) = axes.plot(labels, [r["speed_up"]["chosen"] for r in rows], "o-", label=f"batch {batch}, chosen")
        axes.plot(
            labels,
            [r["speed_up"]["all csr"] for r in rows],
            ":",
            color=line.get_color(),
            label=f"batch {batch}, all CSR",
        )
    axes.axhline(1, color="grey", linewidth=0.8)
    axes.set(xlabel="sparsity of the encoder", ylabel="speed over dense", title="BERT-base, 128 tokens, CPU, float32")
    axes.legend(frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)


@torch.no_grad()
def run(args: argparse.Namespace) -> None:
    torch.set_num_threads(args.threads)
    result: dict[str, Any] = {
        "dtype": "float32", "torch": torch.__version__, "transformers": transformers_version,
        "cpu": cpu_name(), "capability": torch.backends.cpu.get_cpu_capability(), "machine": platform.machine(),
        "rows": [],
    }  # fmt: skip
    if args.add:
        result["rows"] = json.loads(args.results.read_text())["rows"]
    for batch, pairs in zip(args.batches, args.pairs, strict=True):
        for sparsity in args.sparsities:
            row = measure(sparsity, batch, args.length, pairs)
            result["rows"].append(row)
            write(args.results, result, indent=1)
            print({k: v for k, v in row.items() if k != "ratios"}, flush=True)


if __name__ == "__main__":
    parser = make_parser(__doc__, RESULTS, table=True, plot=True)
    parser.add_argument("--sparsities", nargs="*", type=float, default=list(SPARSITIES))
    parser.add_argument("--batches", nargs="*", type=int, default=[1, 8])
    parser.add_argument("--pairs", nargs="*", type=int, default=[9, 3], help="one number a batch size")
    parser.add_argument("--length", type=int, default=LENGTH)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--add", action="store_true", help="keep the rows that the results have")
    arguments = parser.parse_args()
    if not (arguments.table or arguments.plot):
        run(arguments)
    outcome = json.loads(arguments.results.read_text())
    if arguments.plot:
        plot(outcome, arguments.plot)
    print(table(outcome))
