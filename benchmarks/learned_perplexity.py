"""Learned masks of SmolLM2-135M: perplexity after a few steps on WikiText-2, and on text that it has not seen.

    python benchmarks/learned_perplexity.py --method mask --start wanda --steps 40
    python benchmarks/learned_perplexity.py --method mask --start wanda --steps 40 --teacher base
    python benchmarks/learned_perplexity.py --method lora --steps 40
    python benchmarks/learned_perplexity.py --table

A step is 4 windows of 256 tokens of WikiText-2's training text, chosen at random. All linear layers of the blocks are
pruned, to the final sparsity from the first step on; scores learn at 2e-2 (betas 0.9, 0.99), a LoRA of rank 8 at 1e-3,
both with a warm-up over a tenth of the steps and a linear decay. Training on this text adapts to it, too: compare
a mask with the dense model and a LoRA of as many steps. Perplexity: windows of 512 tokens of WikiText-2's test text, of
film reviews, and of pairs of sentences (STS-B). A run that is in the results
already is not repeated.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from pathlib import Path
from typing import Any


os.environ.setdefault("HF_HUB_OFFLINE", "1")
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples"))

import torch
from offline_data import movie_sentences, smollm2_path, sts_b, wikitext_2
from peft import LoraConfig, get_peft_model
from ppruning_perplexity import LENGTH, perplexity
from scaffold import FOLDER, make_parser, markdown, read, settings, show_or_run
from transformers import AutoModelForCausalLM, AutoTokenizer, get_linear_schedule_with_warmup, set_seed

from peft_prune import SMPConfig, calibrate, create_pruning_optimizer, distillation_loss, update_schedule
from peft_prune.training.teacher import as_base


RESULTS = FOLDER / "learned_perplexity.jsonl"
BATCH, WINDOW = 4, 256
TEXTS = ("wikitext-2 test", "films", "pairs")


def mask_config(args: argparse.Namespace) -> SMPConfig:
    how: dict[str, Any] = {"granularity": args.granularity} if args.granularity else {"sparsity": args.sparsity}
    if not args.granularity:
        how["allocation"] = "row"
    if args.rank:
        how |= {"score": "low_rank", "score_rank": args.rank}
    return SMPConfig(
        task_type="CAUSAL_LM", score_init=args.start, num_samples=args.calibration, penalty=0.0, score_lr=args.score_lr,
        score_betas=[0.9, 0.99], sparsity_schedule="constant", **how,
    )  # fmt: skip


def adapted(model: Any, train: torch.Tensor, args: argparse.Namespace) -> tuple[Any, torch.optim.Optimizer]:
    """The model with its adapter, and an optimizer."""
    if args.method == "lora":
        model = get_peft_model(model, LoraConfig(r=8, lora_alpha=16, target_modules="all-linear"))
        trained = (p for p in model.parameters() if p.requires_grad)
        return model, torch.optim.AdamW(trained, lr=args.lr, weight_decay=0.0)
    model = get_peft_model(model, mask_config(args))
    if args.start in ("wanda", "sparsegpt"):
        windows = train[: args.calibration * LENGTH].view(-1, 1, LENGTH)
        calibrate(model, [{"input_ids": row} for row in windows])
    return model, create_pruning_optimizer(model, lr=args.lr)


def fit(model: Any, optimizer: torch.optim.Optimizer, train: torch.Tensor, args: argparse.Namespace) -> list[float]:
    """Train, and return the loss of each step."""
    schedule = get_linear_schedule_with_warmup(optimizer, args.steps // 10, args.steps)
    generator, losses = torch.Generator().manual_seed(args.seed), []
    masked = args.method == "mask"
    if masked:
        update_schedule(model, 0, args.steps)
    model.train()
    for step in range(args.steps):
        starts = torch.randint(0, len(train) - WINDOW, (BATCH,), generator=generator)
        batch = torch.stack([train[s : s + WINDOW] for s in starts.tolist()])
        if args.teacher:
            with as_base(model) as base:
                answers = base(input_ids=batch)
            loss = distillation_loss(model(input_ids=batch), answers, temperature=1.0, overwrite_teacher=True)
        else:
            loss = model(input_ids=batch, labels=batch).loss
        loss.backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if masked:
            update_schedule(model, step + 1, args.steps)
        losses.append(round(loss.item(), 3))
        if step % 10 == 0:
            print(step, losses[-1], flush=True)
    return losses


def texts(tokenizer: Any, args: argparse.Namespace) -> dict[str, torch.Tensor]:
    """Windows of each text that perplexity is measured on."""
    raw = {
        "wikitext-2 test": (wikitext_2("test")[:200_000], args.windows),
        "films": ("\n".join(text for text, _ in movie_sentences()[1]), args.other_windows),
        "pairs": ("\n".join(f"{one} {two}" for one, two, _ in sts_b("test")), args.other_windows),
    }
    return {
        name: tokenizer(text, return_tensors="pt")["input_ids"][0, : count * LENGTH].view(-1, LENGTH)
        for name, (text, count) in raw.items()
    }


def run(args: argparse.Namespace) -> dict:
    set_seed(args.seed)
    path = smollm2_path()
    tokenizer = AutoTokenizer.from_pretrained(path)
    model: Any = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    train = tokenizer(wikitext_2("train")[:2_000_000], return_tensors="pt")["input_ids"][0]
    result, seconds, losses = settings(args), [0.0, 0.0], []
    if args.method != "dense":
        start = time.process_time()
        model, optimizer = adapted(model, train, args)
        ready = time.process_time()
        losses = fit(model, optimizer, train, args)
        seconds = [ready - start, time.process_time() - ready]
    found = {name: round(perplexity(model, windows), 3) for name, windows in texts(tokenizer, args).items()}
    return result | {
        "tokens": args.steps * BATCH * WINDOW, "perplexity": found, "start_cpu_seconds": round(seconds[0]),
        "training_cpu_seconds": round(seconds[1]), "losses": losses, "torch": torch.__version__,
    }  # fmt: skip


def table(path: Path) -> str:
    rows = sorted(
        read(path), key=lambda r: (r["method"], r["granularity"] or "", r["sparsity"], r["start"], r["steps"])
    )
    cells = []
    for r in rows:
        masked = r["method"] == "mask"
        removed = (r["granularity"] or f"{r['sparsity']:.0%}") if masked else "–"
        figures = (f"{r['perplexity'][text]:.1f}" for text in TEXTS)
        start = r["start"] + (f", rank {r['rank']}" if r["rank"] else "") if masked else "–"
        method = r["method"] + (", teacher" if r["teacher"] else "")
        counts = (str(r["steps"]), f"{r['tokens']:,}", str(r["seed"]))
        cells.append([method, removed, start, *counts, *figures, str(r["training_cpu_seconds"])])
    return markdown(["method", "removed", "start", "steps", "tokens", "seed", *TEXTS, "training, CPU s"], cells)


if __name__ == "__main__":
    parser = make_parser(__doc__, RESULTS, table=True)
    parser.add_argument("--method", choices=["dense", "lora", "mask"])
    parser.add_argument("--start", choices=["wanda", "sparsegpt", "magnitude", "zeros"], default="wanda")
    parser.add_argument("--sparsity", type=float, default=0.5)
    parser.add_argument("--granularity", help="n:m, such as 2:4, instead of a sparsity")
    parser.add_argument("--rank", type=int, default=0, help="of scores of low rank; 0: a score for each weight")
    parser.add_argument("--steps", type=int, default=0)
    parser.add_argument("--teacher", choices=["base"], help="train towards the dense model's logits, not the text")
    parser.add_argument("--lr", type=float, default=1e-3, help="of a LoRA")
    parser.add_argument("--score-lr", type=float, default=2e-2)
    parser.add_argument("--calibration", type=int, default=32)
    parser.add_argument("--windows", type=int, default=32)
    parser.add_argument("--other-windows", type=int, default=16)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    if any(settings(arguments).items() <= row.items() for row in read(arguments.results)):
        print(f"{settings(arguments)} is in {arguments.results} already.")
    else:
        show_or_run(arguments, table, run)
