"""GGUF files in llama.cpp, for `gguf_speed.py`. It runs in an environment of its own, which needs no other package:

    python -m venv peer && peer/bin/pip install llama-cpp-python   # built from source: a C++ compiler and cmake
    python benchmarks/gguf_speed.py --keep 0.8 --peer-python peer/bin/python

Reads a job (JSON: the files `exact` and `fast`, the tokens `prompt` and `long`, the numbers `new` and `measured`).
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

from llama_cpp import Llama  # type: ignore[import-not-found]


def load(path: str) -> Any:
    return Llama(path, n_ctx=1024, n_batch=512, n_threads=1, n_threads_batch=1, logits_all=True, verbose=False)


def main(path: Path) -> None:
    job = json.loads(path.read_text())
    exact, ids = load(job["exact"]), []
    exact.eval(job["prompt"])
    logits = exact.scores[len(job["prompt"]) - 1].tolist()
    for _ in range(job["new"]):
        ids.append(int(exact.scores[exact.n_tokens - 1].argmax()))
        exact.eval(ids[-1:])
    fast = load(job["fast"])
    start = time.perf_counter()
    fast.eval(job["long"])
    prefill = time.perf_counter() - start
    start = time.perf_counter()
    for _ in range(job["measured"]):
        fast.eval([int(fast.scores[fast.n_tokens - 1].argmax())])
    decode = time.perf_counter() - start
    print(json.dumps({"ids": ids, "logits": logits, "prefill": prefill, "decode": decode}))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
