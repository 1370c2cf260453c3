"""Smaller models in llama.cpp: the same answers as in Transformers?

    python benchmarks/gguf_answers.py --peer-python peer/bin/python --keep 0.8 --shapes uniform
    python benchmarks/gguf_answers.py --table

llama.cpp has an environment of its own, see `gguf_peer.py`. Each model is written by `save_gguf`, in float32. "greedy"
is how many of 32 tokens that follow a prompt of 16 are those of Transformers, "logits" the largest difference of the
logits behind the prompt, in parts of their standard deviation. "MB" is the file in float16. `export_speed.py` measures
the speed.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

import torch
from gguf_peer import ask_llama_cpp
from language_model import LENGTH, add_arguments, calibration_windows, load, perplexities
from peft import get_peft_model
from scaffold import FOLDER, environment, make_parser, markdown, read, settings, show_or_run
from transformers import set_seed

from peft_prune import StructuredPruningConfig, calibrate
from peft_prune.report import save_gguf


RESULTS = FOLDER / "gguf_answers.jsonl"
PROMPT, NEW = 16, 32


@torch.no_grad()
def in_transformers(model: Any, prompt: list[int]) -> dict[str, Any]:
    """The same by Transformers."""
    model.eval()
    ids = torch.tensor([prompt])
    how = {"do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    found = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=NEW, **how)[0, len(prompt) :]
    return {"ids": found.tolist(), "logits": model(ids).logits[0, -1].tolist()}


def run(args: argparse.Namespace) -> dict[str, Any]:
    set_seed(args.seed)
    model, tokenizer = load()
    windows = calibration_windows(tokenizer, args)
    if args.keep < 1:
        config = StructuredPruningConfig(
            task_type="CAUSAL_LM", keep_ratio=args.keep, shapes=args.shapes, multiple_of=args.multiple_of,
            sequence_length=LENGTH, num_samples=len(windows),
        )  # fmt: skip
        model = get_peft_model(model, config)
        calibrate(model, [{"input_ids": row[None]} for row in windows])
        model = model.merge_and_unload()
    prompt = windows[0, :PROMPT].tolist()
    ours = in_transformers(model, prompt)
    with tempfile.TemporaryDirectory() as folder:
        job = {"exact": f"{folder}/exact.gguf", "prompt": prompt, "new": NEW}
        save_gguf(model, job["exact"], tokenizer, "float32")
        size = save_gguf(model, f"{folder}/half.gguf", tokenizer, "float16").stat().st_size
        theirs = ask_llama_cpp(args.peer_python, job, Path(folder))
    a, b = (torch.tensor(found.pop("logits")) for found in (ours, theirs))
    same = next((i for i, (x, y) in enumerate(zip(ours["ids"], theirs["ids"], strict=True)) if x != y), NEW)
    return settings(args, "peer_python") | {
        "arch": "llama" if args.keep == 1 or args.shapes == "uniform" else "deci", "bytes": size, "greedy": same,
        "logits": float((a - b).abs().max() / a.std()),
    } | perplexities(model, tokenizer, args.windows) | environment()  # fmt: skip


def table(path: Path) -> str:
    lines = []
    for row in read(path):
        what = "dense" if row["keep"] == 1 else f"{row['keep']:.0%}, {row['shapes']}"
        what += f", multiples of {row['multiple_of']}" if row["multiple_of"] > 1 else ""
        same = [f"{row['greedy']} of {NEW}", f"{row['logits']:.1e}"]
        lines.append([what, row["arch"], f"{row['perplexity']:.1f}", f"{row['bytes'] / 1e6:.0f}", *same])
    return markdown(["FLOPs kept", "arch", "WikiText-2", "MB", "greedy", "logits"], lines)


if __name__ == "__main__":
    parser = make_parser(__doc__, RESULTS, table=True)
    parser.add_argument("--keep", type=float, default=1.0, help="share of the FLOPs that stays")
    parser.add_argument("--shapes", choices=["free", "uniform"], default="free")
    parser.add_argument("--multiple-of", type=int, default=1)
    parser.add_argument("--peer-python", help="the Python that has llama-cpp-python")
    add_arguments(parser)
    show_or_run(parser.parse_args(), table, run)
