"""llama.cpp, for `gguf_answers.py` and `export_speed.py`. It has its own environment, and needs no other package:

    python -m venv peer && peer/bin/pip install llama-cpp-python   # built from source: a C++ compiler and cmake
    python benchmarks/gguf_answers.py --keep 0.8 --peer-python peer/bin/python

There it reads a job (JSON), either the file `exact`, the tokens `prompt`, and the number `new`; or `files`, and the
numbers `prompt`, `decode`, `rounds` and `threads`.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any


def ask_llama_cpp(python: str, job: dict[str, Any], folder: Path) -> Any:
    """What `main` prints for a job, run by another Python."""
    path = folder / "job.json"
    path.write_text(json.dumps(job))
    done = subprocess.run([python, __file__, str(path)], check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def load(path: str, threads: int, **how: Any) -> Any:
    from llama_cpp import Llama  # type: ignore[import-not-found]

    return Llama(path, n_ctx=1024, n_batch=512, n_threads=threads, n_threads_batch=threads, verbose=False, **how)


def answers(job: dict[str, Any]) -> dict[str, Any]:
    """The most likely tokens after a prompt, and the logits behind it."""
    model, ids = load(job["exact"], 1, logits_all=True), []
    model.eval(job["prompt"])
    logits = model.scores[len(job["prompt"]) - 1].tolist()
    for _ in range(job["new"]):
        ids.append(int(model.scores[model.n_tokens - 1].argmax()))
        model.eval(ids[-1:])
    return {"ids": ids, "logits": logits}


def speeds(job: dict[str, Any]) -> list[dict[str, float]]:
    """Median seconds of a prompt, and of a token after it, of each file; rounds take all files in turn."""
    models = [load(path, job["threads"]) for path in job["files"]]
    found: list[tuple[list[float], list[float]]] = [([], []) for _ in models]
    for turn in range(job["rounds"] + 1):
        for model, (prefill, decode) in zip(models, found, strict=True):
            model.reset()
            start = time.perf_counter()
            model.eval(job["prompt"])
            middle = time.perf_counter()
            for _ in range(job["decode"]):
                model.eval(job["prompt"][:1])
            if turn:  # the first round warms up
                prefill.append(middle - start)
                decode.append((time.perf_counter() - middle) / job["decode"])
    return [{"prefill": statistics.median(a), "decode": statistics.median(b)} for a, b in found]


def main(path: Path) -> None:
    job = json.loads(path.read_text())
    print(json.dumps(answers(job) if "exact" in job else speeds(job)))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
