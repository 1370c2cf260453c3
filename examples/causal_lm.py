"""A causal LM: dense, with Wanda's mask, and with a mask that is learned from there.

    python examples/causal_lm.py                        # a task mask: pruned and adapted to the text at once
    python examples/causal_lm.py --teacher              # a general mask: towards the dense model's answers
    python examples/causal_lm.py --rank 7 --steps 200   # scores of low rank: no more trained numbers than a LoRA

By default SmolLM2-135M on WikiText-2, both inside PyPI packages; `--model` takes any causal LM, `--text` a file. Prints
perplexities on the end of the text, the size of the adapter, and what the pruned model writes once it is loaded again.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from offline_data import smollm2_path, wikitext_2
from peft import PeftModel, get_peft_model
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainingArguments, set_seed

from peft_prune import PruningTrainer, SMPConfig, calibrate


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
    parser.add_argument("--sparsity", type=float, default=0.5)
    parser.add_argument("--rank", type=int, help="of the scores; without it each weight has a score of its own")
    parser.add_argument("--teacher", action="store_true", help="train towards the model without its mask")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--samples", type=int, default=64, help="windows that the scores start from")
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

    base: Any = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    print(f"dense:   perplexity {perplexity(base, eval_set):.1f}")
    scores = {"score": "low_rank", "score_rank": args.rank} if args.rank else {}
    config = SMPConfig(task_type="CAUSAL_LM", sparsity=args.sparsity, num_samples=args.samples, **scores)
    model = get_peft_model(base, config)
    calibrate(model, DataLoader(train_set.with_format("torch"), args.batch_size))  # scores start as Wanda's
    print(f"Wanda:   perplexity {perplexity(model, eval_set):.1f}")
    arguments = TrainingArguments(
        str(args.output), max_steps=args.steps, warmup_steps=args.steps // 10, save_strategy="no", report_to="none",
        per_device_train_batch_size=args.batch_size, logging_steps=max(1, args.steps // 10),
    )  # fmt: skip
    towards = {"teacher": "base", "distillation_alpha": 1.0, "distillation_temperature": 1.0} if args.teacher else {}
    PruningTrainer(model=model, args=arguments, train_dataset=train_set, **towards).train()
    print(f"learned: perplexity {perplexity(model, eval_set):.1f}")
    model.save_pretrained(args.output)

    loaded = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32), args.output)
    print(f"loaded:  perplexity {perplexity(loaded, eval_set):.1f}")
    size = (args.output / "adapter_model.safetensors").stat().st_size
    print(f"adapter: {size:,} bytes; the model in float16: {2 * sum(p.numel() for p in base.parameters()):,}")
    prompt = torch.tensor([eval_set[0]["input_ids"][:16]])
    with torch.no_grad():
        print(tokenizer.decode(loaded.generate(input_ids=prompt, max_new_tokens=24, do_sample=False)[0]))


if __name__ == "__main__":
    main()
