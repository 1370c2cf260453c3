"""Fixtures for all test files; what else they share is in tests/helpers."""

import os


os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch
from helpers.methods import prune
from helpers.models import make_bert, make_gpt2
from transformers import AutoModelForSequenceClassification

from peft_prune import finalize
from peft_prune.layers import watch


torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _fresh_warnings():
    watch._warned.clear()


@pytest.fixture
def bert():
    return make_bert()


@pytest.fixture
def gpt2():
    return make_gpt2()


@pytest.fixture
def batch():
    torch.manual_seed(1)
    return {"input_ids": torch.randint(0, 90, (4, 9)), "labels": torch.tensor([0, 1, 1, 0])}


@pytest.fixture
def saved(tmp_path):
    """A base model on disk and an adapter that names it."""
    make_bert(num_labels=3).save_pretrained(tmp_path / "base")
    base = AutoModelForSequenceClassification.from_pretrained(tmp_path / "base")
    model = prune(base, 0.8, task_type="SEQ_CLS", allocation="score")
    finalize(model)
    model.save_pretrained(tmp_path / "adapter")
    return tmp_path, model
