"""Time and stability of DSEE's choice of places, for the query and value matrices of an encoder.

    python benchmarks/dsee_support.py

24 matrices of BERT-base's shape with random weights, and the 12 of MiniLM as they are: CPU seconds on one thread, and
the share of the 64 places of a matrix that two seeds agree on.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path


os.environ.setdefault("HF_HUB_OFFLINE", "1")
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples"))

import torch
from offline_data import minilm_path
from scaffold import FOLDER, make_parser, write
from transformers import AutoModel

from peft_prune.updates.decomposition import decompose


RESULTS = FOLDER / "dsee_support.json"
RANK, PLACES = 16, 64


def measure(matrices: torch.Tensor) -> dict[str, float]:
    start = time.process_time()
    one = decompose(matrices, RANK, PLACES, seed=0)
    seconds = time.process_time() - start
    two = decompose(matrices, RANK, PLACES, seed=1)
    shared = sum(len(set(a.tolist()) & set(b.tolist())) for a, b in zip(one.places, two.places, strict=True))
    return {
        "matrices": len(matrices), "width": matrices.shape[2], "cpu_seconds": seconds,
        "agreement": shared / (PLACES * len(matrices)), "residual": float(one.residual.mean()),
    }  # fmt: skip


def main() -> None:
    args = make_parser(__doc__, RESULTS).parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    layers = AutoModel.from_pretrained(minilm_path()).encoder.layer
    names = ("query", "value")
    real = torch.stack([getattr(layer.attention.self, name).weight for layer in layers for name in names])
    decompose(real, RANK, PLACES)  # warm up
    result = {"random": measure(0.04 * torch.randn(24, 768, 768)), "MiniLM": measure(real)}
    print(json.dumps(result, indent=2))
    write(args.results, result)


if __name__ == "__main__":
    main()
