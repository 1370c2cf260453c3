"""PEFT's own tests, as they come in its source distribution. Nothing of them is kept in this repository."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
import tarfile
from pathlib import Path

import peft


PACKAGE = "peft_suite"  # what the folder is called when it is imported
_OFFLINE_DATA = Path(__file__).parents[2] / "examples" / "offline_data.py"


class SuiteUnavailable(RuntimeError):
    """The source distribution could not be had."""


def _offline_data():
    spec = importlib.util.spec_from_file_location("offline_data", _OFFLINE_DATA)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def source_distribution() -> Path:
    """The source distribution of the installed PEFT release, downloaded if it is not in the cache.

    Raises:
        SuiteUnavailable: it could not be downloaded.
    """
    version = peft.__version__
    try:
        return _offline_data().package_file(f"peft=={version}", f"peft-{version}.tar.gz", ("--no-binary", ":all:"))
    except (subprocess.CalledProcessError, OSError, IndexError) as error:
        raise SuiteUnavailable(
            f"The source distribution of peft {version}, which holds its tests, could not be downloaded ({error}). "
            "Put it into the folder named by PEFT_PRUNE_CACHE, or go online."
        ) from error


def unpack(folder: Path) -> Path:
    """Put the tests into a folder as a package, and return where they are."""
    source, target = source_distribution(), folder / PACKAGE
    target.mkdir(parents=True)
    (target / "__init__.py").touch()  # left out of the distribution
    with tarfile.open(source) as archive:
        for member in archive.getmembers():
            parts = Path(member.name).parts
            if len(parts) == 3 and parts[1] == "tests" and parts[2].endswith(".py") and member.isfile():
                (target / parts[2]).write_bytes(archive.extractfile(member).read())
    if not (target / "testing_common.py").exists():
        raise SuiteUnavailable(f"{source.name} holds no tests.")
    return target


if __name__ == "__main__":
    print(unpack(Path(sys.argv[1])))
