"""The tasks of the accuracy benchmarks: movie sentences, question types, tweets (accuracy), STS-B (correlations)."""

from __future__ import annotations

from typing import Any

from datasets import Dataset
from offline_data import disaster_tweets, minilm_path, movie_sentences, question_types
from sts_b import correlation, pairs
from text_classification import accuracy, load_classifier, tokenize


SENTENCES = {"movies": (movie_sentences, 2), "questions": (question_types, 6), "tweets": (disaster_tweets, 2)}
TASKS = (*SENTENCES, "stsb")


def metric_of(task: str) -> str:
    """What a task is judged by: a name in what its metric returns."""
    return "accuracy" if task in SENTENCES else "pearson"


def load_task(task: str, tokenizer: Any) -> tuple[Dataset, Dataset, Any, Any]:
    """Training set, evaluation set, MiniLM with a new head, and the metric of one of `TASKS`."""
    if task in SENTENCES:
        examples, labels = SENTENCES[task]
        train_set, eval_set = (tokenize(part, tokenizer) for part in examples())
        return train_set, eval_set.sort("length"), load_classifier(minilm_path(), num_labels=labels), accuracy
    model = load_classifier(minilm_path(), num_labels=1)
    return pairs("train", tokenizer), pairs("dev", tokenizer).sort("length"), model, correlation
