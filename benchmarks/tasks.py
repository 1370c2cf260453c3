"""The two tasks of the accuracy benchmarks: movie sentences (accuracy) and STS-B (Pearson and Spearman)."""

from __future__ import annotations

from typing import Any

import numpy as np
from datasets import Dataset
from offline_data import minilm_path, movie_sentences, sts_b
from scipy.stats import pearsonr, spearmanr
from text_classification import accuracy, load_classifier, tokenize


def pairs(split: str, tokenizer) -> Dataset:
    rows = sts_b(split)
    encoded = tokenizer([a for a, _, _ in rows], [b for _, b, _ in rows], truncation=True, max_length=128)
    columns = {key: encoded[key] for key in ("input_ids", "token_type_ids", "attention_mask")}
    columns["labels"] = [(score - 2.5) / 1.5 for _, _, score in rows]  # centred, so that a new head need not learn that
    columns["length"] = [len(ids) for ids in encoded["input_ids"]]
    return Dataset.from_dict(columns)


def correlation(predictions) -> dict[str, float]:
    scores = np.asarray(predictions.predictions).reshape(-1)
    return {
        "pearson": 100 * float(pearsonr(scores, predictions.label_ids)[0]),
        "spearman": 100 * float(spearmanr(scores, predictions.label_ids)[0]),
    }


def load_task(task: str, tokenizer: Any) -> tuple[Dataset, Dataset, Any, Any]:
    """Training set, evaluation set, MiniLM with a new head, and the metric of a task (`"movies"` or `"stsb"`)."""
    if task == "movies":
        train_set, eval_set = (tokenize(part, tokenizer) for part in movie_sentences())
        return train_set, eval_set.sort("length"), load_classifier(minilm_path()), accuracy
    model = load_classifier(minilm_path(), num_labels=1)
    return pairs("train", tokenizer), pairs("dev", tokenizer).sort("length"), model, correlation
