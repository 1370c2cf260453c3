"""Fixtures for all test files; what else they share is in tests/helpers."""

import os


os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch
from helpers.models import make_bert, make_gpt2

from peft_prune.tuners import watch


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
