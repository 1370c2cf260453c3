"""Smaller models in llama.cpp: the same answers as in Transformers, and tokens per second beside the dense model's.

    python benchmarks/gguf_speed.py --peer-python peer/bin/python --keep 0.8 --shapes uniform
    python benchmarks/gguf_speed.py --table

llama.cpp has an environment of its own, see `gguf_peer.py`. Each model is written by `save_gguf`, in float32 to compare
answers and in float16 to measure. "greedy" is how many of 32 tokens that follow a prompt of 16 are those of
Transformers, "logits" the largest difference of the logits behind the prompt, in parts of their standard deviation.
Speed: a prompt of 512 tokens, and 64 tokens after it, on one thread; the same in Transformers.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from language_model import LENGTH, add_arguments, calibration_windows, load, perplexities
from peft import get_peft_model
from scaffold import FOLDER, environment, make_parser, markdown, read, settings, show_or_run
from transformers import set_seed

from peft_prune import StructuredPruningConfig, calibrate
from peft_prune.report import save_gguf


RESULTS = FOLDER / "gguf_speed.jsonl"
PROMPT, NEW, MEASURED = 16, 32, 64


@torch.no_grad()
def in_transformers(model: Any, prompt: list[int], long: list[int]) -> dict[str, Any]:
    """The same by Transformers."""
    model.eval()
    ids = torch.tensor([prompt])
    how = {"do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    found = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=NEW, **how)[0, len(prompt) :]
    start = time.perf_counter()
    out = model(input_ids=torch.tensor([long]), use_cache=True)
    prefill = time.perf_counter() - start
    start = time.perf_counter()
    for _ in range(MEASURED):
        token = out.logits[:, -1:].argmax(-1)
        out = model(input_ids=token, past_key_values=out.past_key_values, use_cache=True)
    decode = time.perf_counter() - start
    return {"ids": found.tolist(), "logits": model(ids).logits[0, -1].tolist(), "prefill": prefill, "decode": decode}


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
    prompt, long = windows[0, :PROMPT].tolist(), windows[0].tolist()
    ours = in_transformers(model, prompt, long)
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        job = {"exact": f"{folder}/exact.gguf", "fast": f"{folder}/fast.gguf", "prompt": prompt, "long": long}
        job |= {"new": NEW, "measured": MEASURED}
        save_gguf(model, job["exact"], tokenizer, "float32")
        save_gguf(model, job["fast"], tokenizer, "float16")
        (place / "job.json").write_text(json.dumps(job))
        script = Path(__file__).parent / "gguf_peer.py"
        command = [args.peer_python, str(script), str(place / "job.json")]
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
        theirs = json.loads(done.stdout.splitlines()[-1])
        size = (place / "fast.gguf").stat().st_size
    a, b = (torch.tensor(found.pop("logits")) for found in (ours, theirs))
    same = next((i for i, (x, y) in enumerate(zip(ours["ids"], theirs["ids"], strict=True)) if x != y), NEW)
    speeds = {
        f"{name} {what}": count / found[what]
        for name, found in (("transformers", ours), ("llama.cpp", theirs))
        for what, count in (("prefill", LENGTH), ("decode", MEASURED))
    }
    return settings(args, "peer_python") | {
        "arch": "llama" if args.keep == 1 or args.shapes == "uniform" else "deci", "bytes": size, "greedy": same,
        "logits": float((a - b).abs().max() / a.std()), "tokens_per_second": speeds,
    } | perplexities(model, tokenizer, args.windows) | environment()  # fmt: skip


def table(path: Path) -> str:
    rows = read(path)
    dense = next((row for row in rows if row["keep"] == 1), None)
    keys = ["transformers prefill", "transformers decode", "llama.cpp prefill", "llama.cpp decode"]
    lines = []
    for row in rows:
        what = "dense" if row["keep"] == 1 else f"{row['keep']:.0%}, {row['shapes']}"
        what += f", multiples of {row['multiple_of']}" if row["multiple_of"] > 1 else ""
        speeds = [row["tokens_per_second"][key] for key in keys]
        if dense is not None:
            speeds = [f"{s:.0f} ({s / dense['tokens_per_second'][k]:.2f})" for s, k in zip(speeds, keys, strict=True)]
        same = [f"{row['greedy']} of {NEW}", f"{row['logits']:.1e}"]
        size = f"{row['bytes'] / 1e6:.0f}"
        lines.append([what, row["arch"], f"{row['perplexity']:.1f}", size, *same, *map(str, speeds)])
    return markdown(["FLOPs kept", "arch", "WikiText-2", "MB", "greedy", "logits", *keys], lines)


if __name__ == "__main__":
    parser = make_parser(__doc__, RESULTS, table=True)
    parser.add_argument("--keep", type=float, default=1.0, help="share of the FLOPs that stays")
    parser.add_argument("--shapes", choices=["free", "uniform"], default="free")
    parser.add_argument("--multiple-of", type=int, default=1)
    parser.add_argument("--peer-python", help="the Python that has llama-cpp-python")
    add_arguments(parser)
    show_or_run(parser.parse_args(), table, run)
