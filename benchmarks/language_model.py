"""What benchmarks of language models share: SmolLM2-135M, texts to calibrate and train on, and texts to judge by.

Perplexity is that of windows of 512 tokens, each by itself. WikiText-2's test text is the one that all tables give. The
others are `OTHERS`, which no calibration here sees: they say what is left of the model on text that is not like it.
"""

from __future__ import annotations

import argparse
import math
import os
import pydoc
import resource
import sys
from pathlib import Path
from typing import Any


os.environ.setdefault("HF_HUB_OFFLINE", "1")
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples"))

import torch
from offline_data import movie_sentences, penn_treebank, questions, rated_snippets, smollm2_path, sts_b, wikitext_2
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, AutoTokenizer


LENGTH = 512
OTHERS = ("penn_treebank", "film_sentences", "sts_b")
OTHER_WINDOWS = 8  # of each


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What is pruned by and judged by."""
    parser.add_argument("--calibration", type=int, default=32, help="windows of 512 tokens to calibrate on")
    parser.add_argument("--text", choices=["wikitext", "mixed"], default="wikitext", help="what they are taken from")
    parser.add_argument("--windows", type=int, default=32, help="windows of 512 tokens of WikiText-2's test text")
    parser.add_argument("--seed", type=int, default=0, help="0: the first windows; others: windows drawn at random")


def load(dtype: torch.dtype = torch.float32) -> tuple[Any, Any]:
    """SmolLM2-135M-Instruct and its tokenizer."""
    path = smollm2_path()
    return AutoModelForCausalLM.from_pretrained(path, dtype=dtype).eval(), AutoTokenizer.from_pretrained(path)


def as_tokens(tokenizer: Any, text: str) -> torch.Tensor:
    """A text as tokens: int64, one dimension."""
    return tokenizer(text, return_tensors="pt")["input_ids"][0]


def _film_sentences() -> str:
    return "\n".join(sentence for sentence, _ in movie_sentences()[1])


def _pairs() -> str:
    return "\n".join(f"{first} {second}" for first, second, _ in sts_b("test"))


def _python_manual() -> str:
    from pydoc_data.topics import topics

    return pydoc.plain("\n\n".join(topics[name] for name in sorted(topics)))


def training_tokens(tokenizer: Any, text: str = "wikitext", characters: int = 1_000_000) -> list[torch.Tensor]:
    """Tokens of each source of a training text; a mixture has editorials, reviews, questions and a manual too."""
    sources = [wikitext_2("train")[:characters]]
    if text == "mixed":
        others = [rated_snippets("nytEditorial"), rated_snippets("amazonReview"), questions(), _python_manual()]
        sources += [source[:characters] for source in others]
    return [as_tokens(tokenizer, source) for source in sources]


def calibration_windows(tokenizer: Any, args: argparse.Namespace) -> torch.Tensor:
    """Windows to calibrate on: int64, shape (windows, 512); of a mixture every source gives as many, in turn."""
    sources = training_tokens(tokenizer, args.text)
    generator = torch.Generator().manual_seed(args.seed)
    windows = []
    for index in range(args.calibration):
        source, turn = sources[index % len(sources)], index // len(sources)
        start = turn * LENGTH
        if args.seed:
            start = int(torch.randint(len(source) - LENGTH, (), generator=generator))
        windows.append(source[start : start + LENGTH])
    return torch.stack(windows)


def perplexity(model: Any, windows: torch.Tensor) -> float:
    """Of windows, each by itself: int64, shape (windows, tokens)."""
    model.eval()
    with torch.no_grad():
        losses = [
            cross_entropy(model(input_ids=row[None]).logits[0, :-1].float(), row[1:], reduction="sum").item()
            for row in windows
        ]
    return math.exp(sum(losses) / (windows.numel() - len(windows)))


def perplexities(model: Any, tokenizer: Any, windows: int) -> dict[str, Any]:
    """`perplexity` on WikiText-2's test text, and `others`: on each text of `OTHERS`."""
    texts = {"penn_treebank": penn_treebank("test"), "film_sentences": _film_sentences(), "sts_b": _pairs()}

    def of(text: str, count: int) -> float:
        return perplexity(model, as_tokens(tokenizer, text)[: count * LENGTH].view(-1, LENGTH))

    return {
        "perplexity": of(wikitext_2("test")[:200_000], windows),
        "others": {name: of(texts[name], OTHER_WINDOWS) for name in OTHERS},
    }


def mean_ratio(row: dict[str, Any], dense: dict[str, Any]) -> float:
    """Geometric mean over the other texts of perplexity ÷ that of the dense model."""
    logs = [math.log(row["others"][name] / dense["others"][name]) for name in OTHERS]
    return math.exp(sum(logs) / len(logs))


def peak_memory() -> float:
    """The most memory that this process has held so far, in GB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9
