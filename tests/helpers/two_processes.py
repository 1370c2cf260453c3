"""Trainings of tests/helpers/trainings.py in two processes (gloo), with half of each batch in each.

cd tests && python -m helpers.two_processes RESULTS.json
"""

from __future__ import annotations

import json
import multiprocessing
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from torch.nn.parallel import DistributedDataParallel

from helpers.trainings import TOGETHER, TRAININGS, run


def _process(rank: int, port: int, results: Path) -> None:
    torch.distributed.init_process_group("gloo", f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    found = {
        name: run(TRAININGS[name], share=slice(4 * rank, 4 * rank + 4), wrap=DistributedDataParallel)
        for name in TOGETHER
    }
    results.with_suffix(f".{rank}").write_text(json.dumps(found))
    torch.distributed.destroy_process_group()


def run_together(folder: Path) -> list[dict[str, Any]]:
    """What both processes recorded of each training in [`TOGETHER`], by its name."""
    results = folder / "together.json"
    command = [sys.executable, "-m", "helpers.two_processes", str(results)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        command, env=environment, capture_output=True, text=True, cwd=Path(__file__).parents[1], timeout=500
    )
    if done.returncode:
        raise RuntimeError(done.stderr[-3000:])
    return [json.loads(results.with_suffix(f".{rank}").read_text()) for rank in (0, 1)]


if __name__ == "__main__":
    torch.set_num_threads(1)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    # forked: importing takes longer than all of the trainings
    fork = multiprocessing.get_context("fork")
    started = [fork.Process(target=_process, args=(rank, port, Path(sys.argv[1]))) for rank in (0, 1)]
    for process in started:
        process.start()
    for process in started:
        process.join()
    sys.exit(max(abs(process.exitcode or 0) for process in started))
