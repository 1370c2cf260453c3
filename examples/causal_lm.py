"""A causal LM: SMP with scores of low rank, so that training takes no more numbers than a LoRA.

    python examples/causal_lm.py --sparsity 0.3 --steps 200

By default SmolLM2-135M on WikiText-2, both inside PyPI packages; `--model` takes any causal LM, `--text` a file.
Prints perplexities on the end of the text, before and after, and what the pruned model writes.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from offline_data import smollm2_path, wikitext_2
from peft import get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainingArguments, set_seed

from peft_prune import PruningTrainer, SMPConfig


def windows(tokens: list[int], length: int) -> Dataset:
    rows = [tokens[i : i + length] for i in range(0, len(tokens) - length + 1, length)]
    return Dataset.from_dict({"input_ids": rows, "labels": rows})


@torch.no_grad()
def perplexity(model: Any, rows: Dataset) -> float:
    model.eval()
    batches = torch.tensor(rows["input_ids"], device=model.device).split(4)
    losses = [model(input_ids=batch, labels=batch).loss.item() * len(batch) for batch in batches]
    return math.exp(sum(losses) / len(rows))


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="folder or Hub id of a causal LM")
    parser.add_argument("--text", type=Path, help="file to train on; the last tenth is held out")
    parser.add_argument("--sparsity", type=float, default=0.3)
    parser.add_argument("--rank", type=int, default=7)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--length", type=int, default=256, help="tokens of a window")
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--max-eval", type=int, default=32, help="windows that perplexity is measured on")
    parser.add_argument("--output", type=Path, default=Path("runs/causal_lm"))
    args = parser.parse_args(argv)

    set_seed(0)
    path = args.model or smollm2_path()
    tokenizer = AutoTokenizer.from_pretrained(path)
    text = args.text.read_text() if args.text else wikitext_2("train")[:2_000_000]
    tokens = tokenizer(text)["input_ids"]
    split = len(tokens) * 9 // 10
    train_set, eval_set = windows(tokens[:split], args.length), windows(tokens[split:], args.length)
    eval_set = eval_set.select(range(min(args.max_eval, len(eval_set))))

    model: Any = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    print(f"dense:  perplexity {perplexity(model, eval_set):.1f}")
    config = SMPConfig(
        task_type="CAUSAL_LM", sparsity=args.sparsity, allocation="score", score="low_rank", score_rank=args.rank
    )
    model = get_peft_model(model, config)
    model.print_trainable_parameters()
    arguments = TrainingArguments(
        str(args.output), max_steps=args.steps, per_device_train_batch_size=args.batch_size, save_strategy="no",
        report_to="none", logging_steps=max(1, args.steps // 20),
    )  # fmt: skip
    PruningTrainer(model=model, args=arguments, train_dataset=train_set).train()
    print(f"pruned: perplexity {perplexity(model, eval_set):.1f}")
    model.save_pretrained(args.output)
    prompt = torch.tensor([eval_set[0]["input_ids"][:16]], device=model.device)
    with torch.no_grad():
        print(tokenizer.decode(model.generate(input_ids=prompt, max_new_tokens=24, do_sample=False)[0]))


if __name__ == "__main__":
    main()
