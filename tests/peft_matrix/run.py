"""Run PEFT's own tests with our methods in them, and write a table of what passed.

    python tests/peft_matrix/run.py --output docs/peft_matrix.md

The tests come from the source distribution of the installed PEFT release; random tiny models stand in for the Hub's.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Optional


HERE = Path(__file__).parent
sys.path[:0] = [str(HERE.parent), str(HERE.parents[1])]

from peft_matrix.report import markdown, summary  # noqa: E402
from peft_matrix.suite import PACKAGE, SuiteUnavailable, unpack  # noqa: E402


MODULES = (
    "test_config",
    "test_custom_models",
    "test_decoder_models",
    "test_encoder_decoder_models",
    "test_feature_extraction_models",
    "test_seq_classifier",
    "test_token_classification_qa",
)
# as PEFT's own settings have them
_INI = "[pytest]\nfilterwarnings =\n    error::DeprecationWarning:transformers\n"


def run_module(folder: Path, module: str, chosen: Optional[str]) -> list[dict[str, Any]]:
    """Run one module of PEFT's tests in a process of its own.

    Args:
        folder (`Path`): where the tests were unpacked.
        module (`str`): name of the module.
        chosen (`str`, *optional*): pytest's `-k`: which tests are run, by default all.

    Returns:
        `list[dict]`: of each test `method`, `test`, `outcome`, `why`, `seconds`.

    Raises:
        RuntimeError: pytest itself failed; the message is its output.
    """
    results = folder / f"{module}.json"
    paths = os.pathsep.join([str(HERE.parent), str(HERE.parents[1]), os.environ.get("PYTHONPATH", "")])
    env = os.environ | {"PEFT_MATRIX_RESULTS": str(results), "PYTHONPATH": paths, "HF_HUB_OFFLINE": "1"}
    env |= {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1"), "TOKENIZERS_PARALLELISM": "false"}
    command = [sys.executable, "-m", "pytest", "-c", str(folder / "pytest.ini"), "--rootdir", str(folder)]
    command += ["-p", "peft_matrix.plugin", "-p", "no:cacheprovider", "-q", "--tb=line", "--disable-warnings"]
    command += [f"{PACKAGE}/{module}.py", *(["-k", chosen] if chosen else [])]
    run = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True)
    if run.returncode not in (0, 1, 5):  # passed, tests failed, none collected
        raise RuntimeError(f"pytest could not run {module}:\n{run.stdout[-3000:]}{run.stderr[-3000:]}")
    return json.loads(results.read_text())


def run_matrix(
    modules: Sequence[str] = MODULES, chosen: Optional[str] = None, processes: int = 1
) -> list[dict[str, Any]]:
    """Run modules of PEFT's tests, see [`run_module`].

    Raises:
        SuiteUnavailable: PEFT's tests could not be downloaded.
    """
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        unpack(folder)
        (folder / "pytest.ini").write_text(_INI)
        with ThreadPoolExecutor(processes) as pool:
            parts = list(pool.map(lambda module: run_module(folder, module, chosen), modules))
    return [record for part in parts for record in part]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--modules", nargs="+", default=list(MODULES), choices=MODULES, help="modules of PEFT's tests")
    parser.add_argument("-k", dest="chosen", help="which tests, as for pytest")
    parser.add_argument("--processes", type=int, default=1, help="modules that run at a time")
    parser.add_argument("--json", type=Path, help="file for the outcome of every test")
    parser.add_argument("--output", type=Path, help="file for the table, as Markdown")
    args = parser.parse_args()
    start = time.perf_counter()
    try:
        records = run_matrix(args.modules, args.chosen, args.processes)
    except SuiteUnavailable as error:
        print(error, file=sys.stderr)
        return 2
    minutes = (time.perf_counter() - start) / 60
    if args.json:
        args.json.write_text(json.dumps({"summary": summary(records), "tests": records}, indent=1) + "\n")
    if args.output:
        args.output.write_text(markdown(records, minutes))
    failed = [record for record in records if record["outcome"] == "failed"]
    for record in failed:
        print(f"FAILED {record['test']}\n    {record['why'][:300]}")
    for method, counts in summary(records).items():
        print(f"{method:20}", *(f"{count:5} {outcome}" for outcome, count in counts.items()))
    return 1 if failed or not records else 0


if __name__ == "__main__":
    sys.exit(main())
