"""A small run of `benchmarks/fuzz_files.py`: no file loads with another output, and errors are clear."""

import importlib.util
import signal
from pathlib import Path


def test_damaged_files_of_every_kind():
    path = Path(__file__).parent.parent / "benchmarks" / "fuzz_files.py"
    spec = importlib.util.spec_from_file_location("fuzz_files", path)
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    before = signal.getsignal(signal.SIGALRM)
    try:
        result = script.fuzz(300, seed=11)
    finally:
        signal.signal(signal.SIGALRM, before)
    assert result["different"] == result["hangs"] == 0, result["examples"]
    assert result["unclear"] <= 1, result["examples"]
    rejected = sum(row.get(f"{where} rejected", 0) for row in result["kinds"].values() for where in ("tensors", "json"))
    assert 200 < rejected < 300  # and some load: fields that anybody may change
