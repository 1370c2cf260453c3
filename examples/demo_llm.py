"""A language model with 80 % of the FLOPs, without training: SmolLM2-135M before and after, under ten minutes.

    python examples/demo_llm.py      # or: make demo-llm

Removes heads and neurons, repairs the weights that are kept, saves the smaller model and loads it back. Prints
perplexity on WikiText-2, size, speed and a continuation of the same words for both. `prune_llm.py` trains it on.
"""

from __future__ import annotations

import argparse
import os
import time
from pathlib import Path
from typing import Any


os.environ.setdefault("HF_HUB_OFFLINE", "1")  # nothing is asked of the Hub; has to be set before the imports below

import torch
from offline_data import smollm2_path, wikitext_2
from prune_language_model import continuation
from prune_llm import perplexity, prune, windows
from transformers import AutoModelForCausalLM, AutoTokenizer, set_seed

from peft_prune import load_compact, model_size, save_compact


PROMPT = "The history of the city began"


def describe(name: str, model: Any, tokenizer: Any, held_out: torch.Tensor) -> None:
    """Perplexity, size, speed and a continuation."""
    started = time.perf_counter()
    found = perplexity(model, held_out)
    speed = held_out.numel() / (time.perf_counter() - started)
    size = sum(p.numel() * p.element_size() for p in model.parameters()) / 1e6
    print(f"\n{name}")
    print(f"  perplexity on WikiText-2    {found:.1f}")
    print(f"  parameters                  {model_size(model).parameters:,} ({size:.0f} MB)")
    print(f"  tokens per second, reading  {speed:.0f}")
    print(f"  {' '.join(continuation(model, tokenizer, PROMPT).split())}", flush=True)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="folder or Hub id of a causal LM")
    parser.add_argument("--keep", type=float, default=0.8, help="share of the FLOPs of the blocks that stays")
    parser.add_argument("--samples", type=int, default=32, help="windows to calibrate on")
    parser.add_argument("--length", type=int, default=512, help="tokens of a window")
    parser.add_argument("--windows", type=int, default=16, help="windows that perplexity is measured on")
    parser.add_argument("--output", type=Path, default=Path("runs/demo_llm"))
    args = parser.parse_args(argv)

    set_seed(0)
    path = args.model or smollm2_path()
    tokenizer = AutoTokenizer.from_pretrained(path)
    calibration = windows(tokenizer, wikitext_2("train")[:1_000_000], args.length, args.samples)
    held_out = windows(tokenizer, wikitext_2("test")[:200_000], args.length, args.windows)
    model: Any = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    describe("before", model, tokenizer, held_out)

    started = time.perf_counter()
    save_compact(prune(model, calibration, keep_ratio=args.keep), args.output)
    print(f"\npruned and saved in {time.perf_counter() - started:.0f} seconds: {args.output}")
    describe("after", load_compact(args.output), tokenizer, held_out)


if __name__ == "__main__":
    main()
