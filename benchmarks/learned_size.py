"""Bytes of what is shared of a learned mask of SmolLM2-135M, beside a LoRA's and the merged model's.

    python benchmarks/learned_size.py
    python benchmarks/learned_size.py --table

The largest weights of each row, or of each four, stay: which ones they are hardly changes the bytes. Nothing is
trained. Files as `save_pretrained` writes them; "merged" is the whole model in float16, and `save_sparse` of it.
"""

from __future__ import annotations

import copy
import tempfile
from pathlib import Path
from typing import Any

import torch
from language_model import load
from peft import LoraConfig, get_peft_model
from scaffold import FOLDER, append, make_parser, markdown, read

from peft_prune import MovementPruningConfig, SMPConfig, finalize, save_sparse, update_schedule


RESULTS = FOLDER / "learned_size.jsonl"
TASK = {"task_type": "CAUSAL_LM"}
HALF: dict[str, Any] = TASK | {"sparsity": 0.5, "allocation": "row", "score_init": "magnitude"}
CONFIGS: dict[str, Any] = {
    "LoRA r = 8": LoraConfig(**TASK, r=8, target_modules="all-linear"),
    "mask, 50 %": SMPConfig(**HALF),
    "mask, 70 %": SMPConfig(**HALF | {"sparsity": 0.7}),
    "mask, 2:4": SMPConfig(**TASK, granularity="2:4", score_init="magnitude"),
    "mask, 50 %, and a LoRA r = 8 under it": MovementPruningConfig(**HALF, variant="hard", update="low_rank", r=8),
}


def files(folder: Path, ending: str = ".safetensors") -> int:
    return sum(file.stat().st_size for file in folder.rglob(f"*{ending}"))


def run(name: str, base: torch.nn.Module) -> dict[str, Any]:
    model = get_peft_model(copy.deepcopy(base), CONFIGS[name])
    if not name.startswith("LoRA"):
        update_schedule(model, 1, total_steps=1)
        finalize(model)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        model.save_pretrained(folder / "adapter")
        merged = model.merge_and_unload().to(torch.float16)
        merged.save_pretrained(folder / "merged")
        found = {"adapter_bytes": files(folder / "adapter"), "merged_bytes": files(folder / "merged")}
        if not name.startswith("LoRA"):
            found["sparse_bytes"] = save_sparse(merged, folder / "sparse")["bytes"]
    return {"what": name} | found


def table(path: Path) -> str:
    def mega(row: dict[str, Any], key: str) -> str:
        return f"{row[key] / 1e6:.1f}" if key in row else "–"

    keys = ("adapter_bytes", "merged_bytes", "sparse_bytes")
    head = ["", "adapter, MB", "merged, float16, MB", "save_sparse of it, MB"]
    return markdown(head, [[row["what"], *(mega(row, key) for key in keys)] for row in read(path)])


if __name__ == "__main__":
    args = make_parser(__doc__, RESULTS, table=True).parse_args()
    if not args.table:
        torch.set_num_threads(1)
        dense, _ = load()
        for what in CONFIGS:
            append(args.results, run(what, dense))
    print(table(args.results))
