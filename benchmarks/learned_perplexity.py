"""Learned masks of SmolLM2-135M: perplexity after a few steps, on the text trained on and on text never seen.

    python benchmarks/learned_perplexity.py --method mask --start wanda --steps 40
    python benchmarks/learned_perplexity.py --method mask --steps 40 --teacher base --text mixed
    python benchmarks/learned_perplexity.py --method "mask, low rank" --steps 100 --dtype bfloat16
    python benchmarks/learned_perplexity.py --method lora --steps 40
    python benchmarks/learned_perplexity.py --table

A step is 4 windows of 256 tokens, drawn at random from WikiText-2's training text, or from a mixture (see
`language_model.py`). All linear layers of the blocks are pruned, to the final sparsity from the first step on; scores
learn at 2e-2 (betas 0.9, 0.99), a LoRA of rank 8 at 1e-3, both with a warm-up over a tenth of the steps and a linear
decay. "mask, low rank" trains a LoRA of rank 8 under the mask, too. With `--dtype bfloat16`, matrices are multiplied
in it in training (autocast); perplexity is measured in float32 in any case.

Training on a text adapts to it, too, so a mask trained on WikiText-2 is to be compared with a LoRA of as many steps,
and a mask trained towards the base's logits with one-shot methods on other texts. A run that is in the results already
is not repeated.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import torch
from language_model import add_arguments, calibration_windows, load, mean_ratio, peak_memory, perplexities
from language_model import training_tokens as tokens_of
from peft import LoraConfig, get_peft_model
from scaffold import FOLDER, environment, make_parser, markdown, read, settings, show_or_run
from transformers import get_linear_schedule_with_warmup, set_seed

from peft_prune import (
    MovementPruningConfig,
    SMPConfig,
    calibrate,
    create_pruning_optimizer,
    distillation_loss,
    update_schedule,
)
from peft_prune.training.teacher import as_base


RESULTS = FOLDER / "learned_perplexity.jsonl"
ONE_SHOT = FOLDER / "one_shot_perplexity.jsonl"
BATCH, WINDOW = 4, 256
CHARACTERS = 2_000_000


def mask_config(args: argparse.Namespace) -> Any:
    """What docs/learned_language_models.md recommends."""
    how: dict[str, Any] = {"granularity": args.granularity} if args.granularity else {"sparsity": args.sparsity}
    how |= {"task_type": "CAUSAL_LM", "score_init": args.start, "score_lr": args.score_lr}
    how |= {"num_samples": args.calibration}
    if args.rank:
        how |= {"score": "low_rank", "score_rank": args.rank}
    if args.method == "mask":
        return SMPConfig(**how)
    allocation = "local" if args.granularity else "row"
    how |= {"allocation": allocation, "sparsity_schedule": "constant", "schedule_start": 0.0}
    return MovementPruningConfig(variant="hard", preset="paper", update="low_rank", r=8, score_betas=[0.9, 0.99], **how)


def adapted(model: Any, tokenizer: Any, args: argparse.Namespace) -> tuple[Any, torch.optim.Optimizer]:
    """The model with its adapter, and an optimizer."""
    if args.method == "lora":
        model = get_peft_model(model, LoraConfig(r=8, lora_alpha=16, target_modules="all-linear"))
        trained = (p for p in model.parameters() if p.requires_grad)
        return model, torch.optim.AdamW(trained, lr=args.lr, weight_decay=0.0)
    model = get_peft_model(model, mask_config(args))
    if args.start in ("wanda", "sparsegpt"):
        calibrate(model, [{"input_ids": row[None]} for row in calibration_windows(tokenizer, args)])
    return model, create_pruning_optimizer(model, lr=args.lr)


def batches(tokenizer: Any, args: argparse.Namespace) -> Any:
    """As many as there are steps: int64, shape (4, 256), each window from a source drawn at random."""
    sources = tokens_of(tokenizer, args.text, CHARACTERS)
    generator = torch.Generator().manual_seed(args.seed)

    def window() -> torch.Tensor:
        source = sources[int(torch.randint(len(sources), (), generator=generator))]
        start = int(torch.randint(len(source) - WINDOW, (), generator=generator))
        return source[start : start + WINDOW]

    for _ in range(args.steps):
        yield torch.stack([window() for _ in range(BATCH)])


def loss_of(model: Any, batch: torch.Tensor, args: argparse.Namespace) -> torch.Tensor:
    """Next-token loss, or the divergence from the base."""
    if not args.teacher:
        return model(input_ids=batch, labels=batch).loss
    outputs = model(input_ids=batch)
    with as_base(model) as base:
        answers = base(input_ids=batch)
    return distillation_loss(outputs, answers, temperature=1.0, overwrite_teacher=True)


def fit(model: Any, optimizer: torch.optim.Optimizer, tokenizer: Any, args: argparse.Namespace) -> list[float]:
    """Train, and return the loss of each step."""
    schedule = get_linear_schedule_with_warmup(optimizer, args.steps // 10, args.steps)
    losses: list[float] = []
    masked = args.method != "lora"
    if masked:
        update_schedule(model, 0, args.steps)
    model.train()
    for step, batch in enumerate(batches(tokenizer, args)):
        with torch.autocast("cpu", torch.bfloat16, enabled=args.dtype == "bfloat16"):
            loss = loss_of(model, batch, args)
        loss.backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if masked:
            update_schedule(model, step + 1, args.steps)
        losses.append(round(loss.item(), 3))
        print(step, losses[-1], flush=True)
    return losses


def run(args: argparse.Namespace) -> dict:
    set_seed(args.seed)
    model, tokenizer = load()
    begin = time.process_time()
    model, optimizer = adapted(model, tokenizer, args)
    start = time.process_time()
    losses = fit(model, optimizer, tokenizer, args)
    seconds = {"start_cpu_seconds": round(start - begin), "training_cpu_seconds": round(time.process_time() - start)}
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    found = {"tokens": args.steps * BATCH * WINDOW, "trained_numbers": trained, "peak_gb": round(peak_memory(), 2)}
    measured = perplexities(model, tokenizer, args.windows)
    return settings(args) | found | seconds | {"losses": losses} | measured | environment()


def cells_of(row: dict[str, Any], dense: dict[str, Any]) -> list[str]:
    masked = row["method"] != "lora"
    what = (
        "dense + LoRA r = 8"
        if not masked
        else f"{'general' if row['teacher'] else 'task'} mask"
        + (f", scores of rank {row['rank']}" if row["rank"] else "")
        + (" + LoRA under it" if row["method"] == "mask, low rank" else "")
    )
    removed = (row["granularity"] or f"{row['sparsity']:.0%}") if masked else "–"
    return [
        what, removed, row["start"] if masked else "–", row["text"], str(row["steps"]), f"{row['tokens']:,}",
        f"{row['perplexity']:.1f}", f"{mean_ratio(row, dense):.2f}",
        f"{row['start_cpu_seconds']} + {row['training_cpu_seconds']}", f"{row['peak_gb']}",
    ]  # fmt: skip


def table(path: Path) -> str:
    """All runs, and what trains nothing beside them."""
    one_shot = [row for row in read(ONE_SHOT) if row["text"] == "wikitext" and row["seed"] == 0]
    dense = next(row for row in one_shot if row["method"] == "dense")
    rows = sorted(read(path), key=lambda r: (r["granularity"] or "", r["sparsity"], r["method"], r["steps"]))
    cells = [["dense", "–", "–", "–", "0", "0", f"{dense['perplexity']:.1f}", "1.00", "–", "–"]]
    for row in one_shot:
        if row["method"] in ("wanda", "sparsegpt"):
            removed = row["granularity"] or f"{row['sparsity']:.0%}"
            cells.append(
                [row["method"], removed, "–", row["text"], "0", "0", f"{row['perplexity']:.1f}",
                 f"{mean_ratio(row, dense):.2f}" if "others" in row else "–", str(row["calibration_cpu_seconds"]), "–"]
            )  # fmt: skip
    cells += [cells_of(row, dense) for row in rows]
    head = ["method", "removed", "start", "text", "steps", "tokens", "WikiText-2", "other texts ÷ dense"]
    return markdown([*head, "CPU s, start + training", "GB"], cells)


if __name__ == "__main__":
    parser = make_parser(__doc__, RESULTS, table=True)
    parser.add_argument("--method", choices=["lora", "mask", "mask, low rank"])
    parser.add_argument("--start", choices=["wanda", "sparsegpt", "magnitude", "zeros"], default="wanda")
    parser.add_argument("--sparsity", type=float, default=0.5)
    parser.add_argument("--granularity", help="n:m, such as 2:4, instead of a sparsity")
    parser.add_argument("--rank", type=int, default=0, help="of scores of low rank; 0: a score for each weight")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32", help="of products in training")
    parser.add_argument("--teacher", choices=["base"], help="train towards the dense model's logits, not the text")
    parser.add_argument("--lr", type=float, default=1e-3, help="of a LoRA")
    parser.add_argument("--score-lr", type=float, default=2e-2)
    add_arguments(parser)
    arguments = parser.parse_args()
    known = any(settings(arguments).items() <= row.items() for row in read(arguments.results))
    if known and not arguments.table:
        print(f"{settings(arguments)} is in {arguments.results} already.")
    else:
        show_or_run(arguments, table, run)
