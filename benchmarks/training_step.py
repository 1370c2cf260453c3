"""A pruning step beside a step of plain fine-tuning: time, and peak memory.

The model has BERT-base's shape and random weights. Steps of two methods alternate in one process, so that whatever else
the machine does falls on both; the ratio is the median over pairs. Peak memory is that of a process of its own.

    python benchmarks/training_step.py                        # on a CPU: CPU time of one thread
    python benchmarks/training_step.py --device cuda --dtype bfloat16 --batch 64 --length 128
    python benchmarks/training_step.py --table --plot docs/images/training_step.png
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Optional

import torch
import transformers
from peft import LoraConfig, get_peft_model
from scaffold import FOLDER, make_parser, markdown, write
from transformers import BertConfig, BertForSequenceClassification

from peft_prune import MovementPruningConfig, SMPConfig, compile_selection, create_pruning_optimizer, update_schedule


RESULTS = FOLDER / "training_step.json"
# each with what it is compared with
METHODS: dict[str, tuple[str, Optional[Callable[[], Any]]]] = {
    "SMP-S, penalty": ("fine-tuning", lambda: SMPConfig(allocation="score", **COMMON)),
    "SMP-L, penalty": ("fine-tuning", lambda: SMPConfig(allocation="local", **COMMON)),
    "SMP-S, masks every 10 steps": ("fine-tuning", lambda: SMPConfig(allocation="score", mask_interval=10, **COMMON)),
    "SMP-S, 8-bit AdamW": ("fine-tuning", lambda: SMPConfig(allocation="score", **COMMON)),
    "SMP-S, low rank": ("LoRA", lambda: SMPConfig(allocation="score", score="low_rank", **COMMON)),
    "SMP-L, low rank": ("LoRA", lambda: SMPConfig(score="low_rank", **COMMON)),
    "SMP-L, low rank, no penalty": ("LoRA", lambda: SMPConfig(score="low_rank", penalty=0.0, **COMMON)),
    # what a step costs that computes the gradient of every weight, as scores of low rank have to
    "fine-tuning": ("LoRA", None),
    "hard movement": ("fine-tuning", lambda: MovementPruningConfig(variant="hard", preset="paper", **COMMON)),
}
COMMON: dict[str, Any] = {"task_type": "SEQ_CLS", "sparsity": 0.9}
TARGETS = r"bert\.encoder\..*(query|key|value|dense)"  # those of the pruning methods
STEPS = 1000  # of the schedule; measured from its middle on, where scores differ and sparsity grows


def parse() -> argparse.Namespace:
    parser = make_parser(__doc__, RESULTS, table=True, plot=True)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32", help="of autocast")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--length", type=int, default=64)
    parser.add_argument("--pairs", type=int, default=7)
    parser.add_argument("--methods", nargs="*", choices=list(METHODS), default=list(METHODS))
    parser.add_argument("--compile", action="store_true", help="torch.compile both models")
    parser.add_argument("--memory", help="measure the peak of one method, in this process")
    return parser.parse_args()


class Run:
    """A model in training, one step at a time."""

    def __init__(self, method: str, args: argparse.Namespace) -> None:
        torch.manual_seed(0)
        model: Any = BertForSequenceClassification(BertConfig()).to(args.device)
        make_config = METHODS[method][1] if method in METHODS else None
        self.scheduled = make_config is not None
        if method == "LoRA":
            model = get_peft_model(model, LoraConfig(r=8, target_modules=TARGETS, task_type="SEQ_CLS"))
        elif make_config is not None:
            model = get_peft_model(model, make_config())
        if method.endswith("8-bit AdamW"):
            from torchao.optim import AdamW8bit

            self.optimizer = create_pruning_optimizer(model, lr=1e-4, optimizer_cls=AdamW8bit)
        elif self.scheduled:
            self.optimizer = create_pruning_optimizer(model, lr=1e-4, fused=True)
        else:
            trainable = [p for p in model.parameters() if p.requires_grad]
            self.optimizer = torch.optim.AdamW(trainable, lr=1e-4, fused=True)
        self.plain, self.step_number = model, STEPS // 2
        compile_selection(args.compile)
        self.model = torch.compile(model) if args.compile else model
        shape = (args.batch, args.length)
        self.inputs = torch.randint(5, 30000, shape, device=args.device)
        self.labels = torch.randint(0, 2, (args.batch,), device=args.device)
        self.device, self.dtype = torch.device(args.device), getattr(torch, args.dtype)

    def step(self) -> None:
        if self.scheduled:
            update_schedule(self.plain, self.step_number, STEPS)
        self.step_number += 1
        with torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32):
            loss = self.model(input_ids=self.inputs, labels=self.labels).loss
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()

    def seconds(self) -> float:
        """Of a step: CPU time of the process, or on a GPU the time until it is done."""
        if self.device.type == "cpu":
            start = time.process_time()
            self.step()
            return time.process_time() - start
        torch.cuda.synchronize()
        start = time.perf_counter()
        self.step()
        torch.cuda.synchronize()
        return time.perf_counter() - start


def peak(method: str, args: argparse.Namespace) -> float:
    """Peak memory of three steps in MB: of the process above what the libraries take, or of the GPU."""
    before = peak_of_process()
    run = Run(method, args)
    for _ in range(3):
        run.step()
    if run.device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 2**20
    return peak_of_process() - before


def peak_of_process() -> float:
    """The most memory that this process ever had, in MB (Linux)."""
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) / 1024


def peak_in_a_process(method: str, args: argparse.Namespace) -> float:
    command = [sys.executable, __file__, "--memory", method, "--device", args.device, "--dtype", args.dtype]
    command += ["--batch", str(args.batch), "--length", str(args.length)] + ["--compile"] * args.compile
    # what the allocator is told for the sake of timing would count here
    environment = {name: value for name, value in os.environ.items() if not name.startswith("MALLOC_")}
    done = subprocess.run(command, check=True, capture_output=True, text=True, env=environment)
    return float(done.stdout.split()[-1])


def compare(method: str, args: argparse.Namespace) -> dict[str, Any]:
    reference = METHODS[method][0]
    ours, theirs = Run(method, args), Run(reference, args)
    for run in (ours, theirs):
        run.step()
        run.step()
    pairs = [(ours.seconds(), theirs.seconds()) for _ in range(args.pairs)]
    memory = [peak_in_a_process(name, args) for name in (method, reference)]
    trained = [sum(p.numel() for p in run.plain.parameters() if p.requires_grad) for run in (ours, theirs)]
    return {
        "method": method, "against": reference, "ratio": statistics.median(a / b for a, b in pairs),
        "ratios": sorted(a / b for a, b in pairs), "seconds": statistics.median(a for a, _ in pairs),
        "seconds_of_other": statistics.median(b for _, b in pairs), "memory_mb": memory[0],
        "memory_mb_of_other": memory[1], "trained": trained[0], "trained_by_other": trained[1],
    }  # fmt: skip


def main(args: argparse.Namespace) -> None:
    machine = platform.processor() or platform.machine()
    conditions = {
        "device": torch.cuda.get_device_name() if args.device == "cuda" else machine, "dtype": args.dtype,
        "batch": args.batch, "length": args.length, "threads": torch.get_num_threads(), "compiled": args.compile,
        "torch": torch.__version__, "transformers": transformers.__version__,
        "malloc": " ".join(f"{k}={v}" for k, v in sorted(os.environ.items()) if k.startswith("MALLOC_")),
    }  # fmt: skip
    rows = json.loads(args.results.read_text()) if args.results.exists() else []
    for method in args.methods:
        row = conditions | compare(method, args)
        rows = [old for old in rows if any(old.get(k, "") != row[k] for k in (*conditions, "method"))] + [row]
        print(json.dumps(row), flush=True)
        write(args.results, rows, indent=1)  # now: a run may be cut short


def table(path: Path) -> str:
    lines = []
    for row in json.loads(path.read_text()):
        time_ratio = f"{row['ratio']:.2f} ({row['seconds']:.2f} s ÷ {row['seconds_of_other']:.2f} s)"
        memory = f"{row['memory_mb'] / row['memory_mb_of_other']:.2f} ({row['memory_mb']:,.0f} MB)"
        compiled = ", compiled" if row["compiled"] else ""
        what = f"{row['method']} ÷ {row['against']}{compiled}"
        trained = f"{row['trained'] / row['trained_by_other']:.2f} ({row['trained']:,})"
        sizes = f"{row['batch']} × {row['length']}"
        lines.append([what, f"{row['device']}, {row['dtype']}", sizes, time_ratio, memory, trained])
    return markdown(["method ÷ against", "device", "batch", "time", "peak memory", "trained numbers"], lines)


def plot(path: Path, target: Path) -> None:
    """Time with the range of the pairs, and peak memory: a bar for each method, beside what it is compared with."""
    from matplotlib.figure import Figure

    rows = json.loads(path.read_text())[::-1]
    figure = Figure(figsize=(9, 1 + 0.5 * len(rows)), layout="constrained")
    times, memory = figure.subplots(1, 2, sharey=True)
    labels = [f"{row['method']}\n÷ {row['against']}" for row in rows]
    ratios = [row["ratio"] for row in rows]
    spread = [[r["ratio"] - r["ratios"][0] for r in rows], [r["ratios"][-1] - r["ratio"] for r in rows]]
    times.barh(labels, ratios, xerr=spread, capsize=3, color="tab:blue")
    memory.barh(labels, [row["memory_mb"] / row["memory_mb_of_other"] for row in rows], color="tab:orange")
    for axes, title in ((times, "time of a step, range of the pairs"), (memory, "peak memory")):
        axes.axvline(1, color="black", linewidth=0.8)
        axes.set_xlabel(title)
    figure.savefig(target, dpi=130)


if __name__ == "__main__":
    arguments = parse()
    if arguments.table or arguments.plot:
        print(table(arguments.results))
        if arguments.plot:
            plot(arguments.results, arguments.plot)
    elif arguments.memory:
        print(peak(arguments.memory, arguments))
    else:
        main(arguments)
