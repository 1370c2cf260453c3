"""The two tasks of the accuracy benchmarks: movie sentences (accuracy) and STS-B (Pearson and Spearman)."""

from __future__ import annotations

from typing import Any

from datasets import Dataset
from offline_data import minilm_path, movie_sentences
from sts_b import correlation, pairs
from text_classification import accuracy, load_classifier, tokenize


def load_task(task: str, tokenizer: Any) -> tuple[Dataset, Dataset, Any, Any]:
    """Training set, evaluation set, MiniLM with a new head, and the metric of a task (`"movies"` or `"stsb"`)."""
    if task == "movies":
        train_set, eval_set = (tokenize(part, tokenizer) for part in movie_sentences())
        return train_set, eval_set.sort("length"), load_classifier(minilm_path()), accuracy
    model = load_classifier(minilm_path(), num_labels=1)
    return pairs("train", tokenizer), pairs("dev", tokenizer).sort("length"), model, correlation
