"""A task with labels for a language model: a prompt with a sentence of a film review, "positive" or "negative" follows.

    python benchmarks/learned_labels.py --method mask --dtype bfloat16
    python benchmarks/learned_labels.py --method lora --dtype bfloat16
    python benchmarks/learned_labels.py --table

SmolLM2-135M-Instruct, half of the weights of all linear layers of the blocks removed. A step is 16 sentences drawn at
random; only the answer counts in the loss. A sentence is answered by the likelier of the two words. Methods, learning
rates and `--dtype` are those of `learned_perplexity.py`; "wanda" and "dense" are not trained.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import torch
from language_model import load, peak_memory
from learned_perplexity import mask_config
from offline_data import movie_sentences
from peft import LoraConfig, get_peft_model
from scaffold import FOLDER, environment, make_parser, markdown, mean_and_each, read, settings, show_or_run
from torch.nn.functional import cross_entropy
from torch.nn.utils.rnn import pad_sequence
from transformers import get_linear_schedule_with_warmup, set_seed

from peft_prune import WandaConfig, calibrate, create_pruning_optimizer, update_schedule


RESULTS = FOLDER / "learned_labels.jsonl"
BATCH = 16
PROMPT = "Sentence of a film review: {}\nIs it positive or negative? Answer:"
ANSWERS = (" negative", " positive")


class Task:
    """Prompts as tokens: answers are single ones."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self.answers = torch.tensor([tokenizer(answer)["input_ids"][0] for answer in ANSWERS])

    def batch(self, sentences: list[str]) -> dict[str, torch.Tensor]:
        """Inputs, padded on the left: int64, shape (sentences, tokens)."""
        rows = [torch.tensor(self.tokenizer(PROMPT.format(text))["input_ids"]) for text in sentences]
        ids, real = (
            pad_sequence(what, batch_first=True, padding_side="left")
            for what in (rows, [torch.ones_like(row) for row in rows])
        )
        return {"input_ids": ids, "attention_mask": real}

    def logits(self, model: Any, sentences: list[str]) -> torch.Tensor:
        """Of all words, where the answer comes: shape (sentences, vocabulary)."""
        return model(**self.batch(sentences), logits_to_keep=1).logits[:, -1].float()

    @torch.no_grad()
    def accuracy(self, model: Any, examples: list[tuple[str, int]]) -> float:
        """In %."""
        model.eval()
        right = 0
        for start in range(0, len(examples), 50):
            sentences, labels = zip(*examples[start : start + 50], strict=True)
            chosen = self.logits(model, list(sentences))[:, self.answers].argmax(-1)
            right += int((chosen == torch.tensor(labels)).sum())
        return 100 * right / len(examples)


def adapted(model: Any, task: Task, sentences: list[str], args: argparse.Namespace) -> Any:
    """The model with its adapter, calibrated on prompts if it needs that."""
    if args.method == "lora":
        return get_peft_model(model, LoraConfig(r=8, lora_alpha=16, target_modules="all-linear"))
    if args.method == "wanda":
        config: Any = WandaConfig(task_type="CAUSAL_LM", sparsity=args.sparsity, num_samples=args.calibration)
    else:
        config = mask_config(args)
    model = get_peft_model(model, config)
    calibrate(model, [task.batch(sentences[i : i + BATCH]) for i in range(0, args.calibration, BATCH)])
    return model


def fit(model: Any, task: Task, examples: list[tuple[str, int]], args: argparse.Namespace) -> list[float]:
    """Train, and return the mean loss of each tenth of the steps."""
    generator = torch.Generator().manual_seed(args.seed)
    optimizer = create_pruning_optimizer(model, lr=args.lr) if args.method != "lora" else None
    if optimizer is None:
        optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=args.lr, weight_decay=0.0)
    else:
        update_schedule(model, 0, args.steps)
    schedule = get_linear_schedule_with_warmup(optimizer, args.steps // 10, args.steps)
    losses: list[float] = []
    model.train()
    for step in range(args.steps):
        chosen = [examples[int(i)] for i in torch.randint(len(examples), (BATCH,), generator=generator)]
        sentences, labels = zip(*chosen, strict=True)
        with torch.autocast("cpu", torch.bfloat16, enabled=args.dtype == "bfloat16"):
            loss = cross_entropy(task.logits(model, list(sentences)), task.answers[torch.tensor(labels)])
        loss.backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if args.method != "lora":
            update_schedule(model, step + 1, args.steps)
        losses.append(loss.item())
        print(step, round(losses[-1], 3), flush=True)
    tenth = max(args.steps // 10, 1)
    return [round(sum(part) / len(part), 3) for i in range(0, len(losses), tenth) if (part := losses[i : i + tenth])]


def run(args: argparse.Namespace) -> dict[str, Any]:
    set_seed(args.seed)
    train_set, held_out = movie_sentences()
    model, tokenizer = load()
    task, start = Task(tokenizer), time.process_time()
    found: dict[str, Any] = {}
    if args.method != "dense":
        model = adapted(model, task, [text for text, _ in train_set], args)
    if args.method in ("lora", "mask", "mask, low rank"):
        found["losses"] = fit(model, task, train_set, args)
    found["cpu_seconds"] = round(time.process_time() - start)
    scores = {"accuracy": task.accuracy(model, held_out[: args.held_out])}
    majority = sum(label for _, label in held_out[: args.held_out]) / args.held_out
    scores["majority"] = 100 * max(majority, 1 - majority)
    return settings(args) | found | {"scores": scores, "peak_gb": round(peak_memory(), 2)} | environment()


def table(path: Path) -> str:
    """Accuracy of each method: mean, and each seed's."""
    kinds: dict[tuple[str, int], list[dict]] = {}
    for row in read(path):
        kinds.setdefault((row["method"], row["steps"] if "losses" in row else 0), []).append(row)
    majority = next(iter(kinds.values()))[0]["scores"]["majority"]
    lines = [
        [method, str(steps), mean_and_each(rows, "accuracy"), str(rows[0]["cpu_seconds"]), str(rows[0]["peak_gb"])]
        for (method, steps), rows in kinds.items()
    ]
    return f"majority: {majority:.1f}\n\n" + markdown(["method", "steps", "accuracy", "CPU s", "GB"], lines)


if __name__ == "__main__":
    parser = make_parser(__doc__, RESULTS, table=True)
    parser.add_argument("--method", choices=["dense", "lora", "wanda", "mask", "mask, low rank"])
    parser.add_argument("--sparsity", type=float, default=0.5)
    parser.add_argument("--granularity", help="n:m, such as 2:4, instead of a sparsity")
    parser.add_argument("--start", choices=["wanda", "sparsegpt"], default="wanda")
    parser.add_argument("--rank", type=int, default=0, help="of scores of low rank; 0: a score for each weight")
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32", help="of products in training")
    parser.add_argument("--lr", type=float, default=1e-3, help="of a LoRA")
    parser.add_argument("--score-lr", type=float, default=2e-2)
    parser.add_argument("--calibration", type=int, default=128, help="sentences to calibrate on")
    parser.add_argument("--held-out", type=int, default=500, help="sentences to judge by")
    parser.add_argument("--seed", type=int, default=0)
    show_or_run(parser.parse_args(), table, run)
