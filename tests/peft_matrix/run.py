"""Run PEFT's own tests with our methods in them, and write a table of what passed.

    python tests/peft_matrix/run.py --output docs/peft_matrix.md

The tests come from the source distribution of the installed PEFT release; random tiny models stand in for the Hub's.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
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


def run_module(folder: Path, module: str, chosen: Optional[str]) -> dict[str, Any]:
    """Run one module of PEFT's tests in a process of its own.

    Args:
        folder (`Path`): where the tests were unpacked.
        module (`str`): name of the module.
        chosen (`str`, *optional*): pytest's `-k`: which tests are run, by default all.

    Returns:
        `dict`: `seconds` of wall time, `date`, and of each test in `tests` `method`, `test`, `outcome`, `why`,
        `seconds`.

    Raises:
        RuntimeError: pytest itself failed; the message is its output.
    """
    results, start = folder / f"{module}.json", time.perf_counter()
    paths = os.pathsep.join([str(HERE.parent), str(HERE.parents[1]), os.environ.get("PYTHONPATH", "")])
    env = os.environ | {"PEFT_MATRIX_RESULTS": str(results), "PYTHONPATH": paths, "HF_HUB_OFFLINE": "1"}
    env |= {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1"), "TOKENIZERS_PARALLELISM": "false"}
    command = [sys.executable, "-m", "pytest", "-c", str(folder / "pytest.ini"), "--rootdir", str(folder)]
    command += ["-p", "peft_matrix.plugin", "-p", "no:cacheprovider", "-q", "--tb=line", "--disable-warnings"]
    command += [f"{PACKAGE}/{module}.py", *(["-k", chosen] if chosen else [])]
    run = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True)
    if run.returncode not in (0, 1, 5):  # passed, tests failed, none collected
        raise RuntimeError(f"pytest could not run {module}:\n{run.stdout[-3000:]}{run.stderr[-3000:]}")
    seconds, today = round(time.perf_counter() - start), datetime.date.today().isoformat()
    return {"seconds": seconds, "date": today, "tests": json.loads(results.read_text())}


def run_matrix(
    modules: Sequence[str] = MODULES, chosen: Optional[str] = None, keep: Optional[Path] = None
) -> list[dict[str, Any]]:
    """Run modules of PEFT's tests one after another, see [`run_module`].

    Args:
        modules (`Sequence[str]`): names of the modules.
        chosen (`str`, *optional*): pytest's `-k`.
        keep (`Path`, *optional*): folder where the outcome of each module is kept; what is there is not run again.

    Raises:
        SuiteUnavailable: PEFT's tests could not be downloaded.
    """
    parts = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        unpack(folder)
        (folder / "pytest.ini").write_text(_INI)
        for module in modules:
            kept = None if keep is None else keep / f"{module}.json"
            if kept is not None and kept.exists():
                parts.append(json.loads(kept.read_text()))
                continue
            parts.append(run_module(folder, module, chosen))
            if kept is not None:
                kept.parent.mkdir(parents=True, exist_ok=True)
                kept.write_text(json.dumps(parts[-1], indent=1) + "\n")
    return parts


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--modules", nargs="+", default=list(MODULES), choices=MODULES, help="modules of PEFT's tests")
    parser.add_argument("-k", dest="chosen", help="which tests, as for pytest")
    parser.add_argument("--keep", type=Path, help="folder for the outcome of each module, which is not run again then")
    parser.add_argument("--output", type=Path, help="file for the table, as Markdown")
    args = parser.parse_args()
    try:
        parts = run_matrix(args.modules, args.chosen, args.keep)
    except SuiteUnavailable as error:
        print(error, file=sys.stderr)
        return 2
    if args.output:
        args.output.write_text(markdown(parts))
    records = [record for part in parts for record in part["tests"]]
    failed = [record for record in records if record["outcome"] == "failed"]
    for record in failed:
        print(f"FAILED {record['test']}\n    {record['why'][:300]}")
    for method, counts in summary(records).items():
        print(f"{method:20}", *(f"{count:5} {outcome}" for outcome, count in counts.items()))
    return 1 if failed or not records else 0


if __name__ == "__main__":
    sys.exit(main())
