"""llm-compressor's Wanda and SparseGPT, for `one_shot_perplexity.py`. It runs in an environment of its own:

    python -m venv peer && peer/bin/pip install torch==2.13.0 llmcompressor==0.14.0
    python benchmarks/one_shot_perplexity.py --method "llm-compressor, wanda" --peer-python peer/bin/python

Reads a job (JSON: `model`, `windows`, `method`, `sparsity`, `pattern`, `save`) and saves the pruned model's weights.
"""

from __future__ import annotations

import json
import resource
import sys
import time
from pathlib import Path

import torch
from datasets import Dataset
from llmcompressor import oneshot  # type: ignore[import-not-found]
from llmcompressor.modifiers.pruning import (  # type: ignore[import-not-found]
    SparseGPTModifier,
    WandaPruningModifier,
)
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM


def main(path: Path) -> None:
    job = json.loads(path.read_text())
    windows = load_file(job["windows"])["windows"]
    model = AutoModelForCausalLM.from_pretrained(job["model"], dtype=torch.float32)
    modifier = {"wanda": WandaPruningModifier, "sparsegpt": SparseGPTModifier}[job["method"]]
    recipe = modifier(
        sparsity=job["sparsity"], mask_structure=job["pattern"], targets=["Linear"], ignore=["re:.*lm_head"]
    )
    rows = [{"input_ids": row, "attention_mask": [1] * len(row)} for row in windows.tolist()]
    start = time.process_time()
    oneshot(
        model=model, dataset=Dataset.from_list(rows), recipe=[recipe], num_calibration_samples=len(rows),
        max_seq_length=windows.shape[1], shuffle_calibration_samples=False,
    )  # fmt: skip
    seconds = time.process_time() - start
    held = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9
    weights = {name: weight.detach().contiguous() for name, weight in model.named_parameters()}
    save_file(weights, job["save"])
    print(json.dumps({"calibration_cpu_seconds": round(seconds), "peak_gb": round(held, 2)}))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
