"""P-pruning of SmolLM2-135M: perplexity on WikiText-2 after pruning and after a short LoRA recovery.

    python benchmarks/ppruning_perplexity.py --criterion similarity --keep 0.8
    python benchmarks/ppruning_perplexity.py --table

Heads are removed in groups that share keys and values. The recovery trains a LoRA of rank 8 on all linear layers of the
smaller model for `--steps` steps of 4 × 256 tokens of WikiText-2's training text. Perplexity is that of the first
`--windows` windows of 512 tokens of the test text.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import torch
from language_model import LENGTH, as_tokens, load, perplexity, training_tokens, wikitext_2
from peft import LoraConfig, get_peft_model
from scaffold import FOLDER, make_parser, markdown, read, settings, show_or_run
from transformers import get_linear_schedule_with_warmup, set_seed

from peft_prune import PPruningConfig, calibrate, model_size


RESULTS = FOLDER / "ppruning_perplexity.jsonl"


def recover(model: Any, tokens: torch.Tensor, args: argparse.Namespace) -> Any:
    """Train a LoRA on the smaller model, and merge it."""
    config = LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")
    model = get_peft_model(model, config).train()
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=args.lr, weight_decay=0.0)
    schedule = get_linear_schedule_with_warmup(optimizer, args.steps // 10, args.steps)
    generator = torch.Generator().manual_seed(args.seed)
    for step in range(args.steps):
        starts = torch.randint(0, len(tokens) - 256, (4,), generator=generator)
        batch = torch.stack([tokens[s : s + 256] for s in starts.tolist()])
        loss = model(input_ids=batch, labels=batch).loss
        loss.backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if step % 10 == 0:
            print(step, round(loss.item(), 3), flush=True)
    return model.merge_and_unload()


def run(args: argparse.Namespace) -> dict:
    set_seed(args.seed)
    model, tokenizer = load()
    (train,) = training_tokens(tokenizer, characters=2_000_000)
    test = as_tokens(tokenizer, wikitext_2("test")[:200_000])[: args.windows * LENGTH].view(-1, LENGTH)
    result = settings(args)
    if args.criterion == "dense":
        return result | {"pruned": perplexity(model, test), "parameters": model_size(model).parameters}
    config = PPruningConfig(
        task_type="CAUSAL_LM", keep_ratio=args.keep, criterion=args.criterion, sequence_length=LENGTH, num_samples=16,
        seed=args.seed,
    )  # fmt: skip
    model = get_peft_model(model, config)
    start = time.process_time()
    shares = calibrate(model, ({"input_ids": row} for row in train[: 16 * LENGTH].view(16, 1, LENGTH)))
    seconds = time.process_time() - start
    model = model.merge_and_unload()
    pruned = perplexity(model, test)
    print("pruned", pruned, flush=True)
    recovered = perplexity(recover(model, train, args), test)
    return result | {
        "pruned": pruned, "recovered": recovered, "shares": shares, "calibration_cpu_seconds": seconds,
        "parameters": model_size(model).parameters, "torch": torch.__version__,
    }  # fmt: skip


def table(path: Path) -> str:
    rows = {(r["criterion"], r["keep"]): r for r in read(path)}
    lines = []
    for (criterion, keep), row in sorted(rows.items(), key=lambda item: (-item[0][1], item[1].get("recovered", 0))):
        if criterion != "dense":
            lines.append([f"{keep:.0%}", criterion, f"{row['pruned']:,.1f}", f"{row['recovered']:.1f}"])
    compared = markdown(["FLOPs kept", "criterion", "after pruning", "after LoRA recovery"], lines)
    return f"dense: {rows['dense', 1.0]['pruned']:.1f}\n\n{compared}"


if __name__ == "__main__":
    parser = make_parser(__doc__, RESULTS, table=True)
    parser.add_argument("--criterion", choices=["dense", "similarity", "magnitude", "random"])
    parser.add_argument("--keep", type=float, default=1.0)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--windows", type=int, default=32)
    parser.add_argument("--seed", type=int, default=0)
    show_or_run(parser.parse_args(), table, run)
