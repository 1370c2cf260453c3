"""Tasks of `method_comparison.py`: queries, responses whose last words are the answer, and text for forgetting."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from language_model import as_tokens
from offline_data import movie_sentences, smollm2_path, wikitext_2


TEMPLATE = "Question: {query} Think step by step.\nAnswer:"
MARKS = ("The answer is:", "The final answer is:", "####")
Row = tuple[str, str]  # query, response


def default_model() -> str:
    return smollm2_path()


def answer(text: str) -> str | None:
    """What follows the last mark, up to the end of its line, as a number where it is one; `None` without a mark."""
    start = max(text.rfind(mark) + len(mark) if mark in text else -1 for mark in MARKS)
    if start < 0:
        return None
    found = text[start:].strip().partition("\n")[0].strip(" .!?$%").replace(",", "")
    try:
        return str(float(found))
    except ValueError:
        return found


def films() -> dict[str, list[Row]]:
    """Whether a film review is good or bad."""

    def rows(examples: list[tuple[str, int]]) -> list[Row]:
        words = ("bad", "good")
        return [(f'Is this film review good or bad? "{text}"', f" The answer is: {words[y]}") for text, y in examples]

    training, held_out = movie_sentences()
    return {"train": rows(training), "valid": rows(held_out[:500]), "test": rows(held_out[500:])}


def metamath() -> dict[str, list[Row]]:
    """PEFT's task: trained on MetaMathQA, tested on GSM8K. From the Hub."""
    from datasets import load_dataset

    rows = [(r["query"], " " + r["response"]) for r in load_dataset("meta-math/MetaMathQA", split="train")]
    rows = [row for row in rows if len(row[0]) + len(row[1]) <= 1300]
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(0)).tolist()
    rows = [rows[i] for i in order]
    test = [(r["question"], " " + r["answer"]) for r in load_dataset("openai/gsm8k", "main", split="test")]
    return {"train": rows[50:], "valid": rows[:50], "test": test}


def of_folder(folder: Path) -> dict[str, list[Row]]:
    """`train.jsonl`, `valid.jsonl` and `test.jsonl`, lines with `query` and `response`."""
    splits = {}
    for name in ("train", "valid", "test"):
        lines = (folder / f"{name}.jsonl").read_text().splitlines()
        splits[name] = [(row["query"], row["response"]) for row in map(json.loads, lines)]
    return splits


class Task:
    """Batches to train on, and figures of a model."""

    def __init__(self, tokenizer: Any, args: argparse.Namespace, device: torch.device) -> None:
        self.tokenizer, self.args, self.device = tokenizer, args, device
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.eos_token
        named = {"films": films, "metamath": metamath}
        self.rows = named[args.data]() if args.data in named else of_folder(Path(args.data))
        self.names: tuple[str, ...] = ("metamath", "gsm8k") if args.data == "metamath" else (Path(args.data).name,)

    def _batch(self, rows: list[Row]) -> dict[str, torch.Tensor]:
        """Query and response with an end of text, padded on the right: int64, shape (batch, tokens)."""
        texts = [TEMPLATE.format(query=query) + response + self.tokenizer.eos_token for query, response in rows]
        batch = self.tokenizer(
            texts, padding=True, padding_side="right", truncation=True, max_length=self.args.length, return_tensors="pt"
        ).to(self.device)
        labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
        return {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"], "labels": labels}

    def training_batches(self, count: int) -> Iterator[dict[str, torch.Tensor]]:
        rows, size = self.rows["train"], self.args.batch_size
        for index in range(count):
            yield self._batch([rows[(index * size + i) % len(rows)] for i in range(size)])

    def probe(self) -> dict[str, torch.Tensor]:
        """What speed is measured on."""
        batch = self._batch(self.rows["train"][: self.args.batch_size])
        return {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}

    @torch.no_grad()
    def accuracy(self, model: Any, split: str) -> float:
        """Share of greedy answers that are the response's."""
        model.eval()
        rows, right = self.rows[split][: self.args.max_eval], 0
        for start in range(0, len(rows), self.args.batch_size):
            part = rows[start : start + self.args.batch_size]
            queries = [TEMPLATE.format(query=query) for query, _ in part]
            batch = self.tokenizer(queries, padding=True, padding_side="left", return_tensors="pt").to(self.device)
            inputs = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}
            found = model.generate(
                **inputs, max_new_tokens=self.args.new_tokens, do_sample=False, pad_token_id=self.tokenizer.pad_token_id
            )
            texts = self.tokenizer.batch_decode(found[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)
            right += sum(answer(text) == answer(response) for text, (_, response) in zip(texts, part, strict=True))
        return right / len(rows)

    @torch.no_grad()
    def general_loss(self, model: Any) -> float:
        """Mean loss per token on text that is not the task's."""
        model.eval()
        count = self.args.general_windows
        windows = as_tokens(self.tokenizer, wikitext_2("test")[: count * 3000])[: count * 256].view(-1, 256)
        losses = [model(input_ids=row[None], labels=row[None]).loss.item() for row in windows.to(self.device)]
        return sum(losses) / len(losses)
