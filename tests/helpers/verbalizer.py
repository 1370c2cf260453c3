"""Label words over a tiny masked LM, and inputs with and without a mask token."""

import torch

from helpers.data import tokenizer
from peft_prune import make_verbalizer


MASK = 4
IDS = torch.tensor([[1, 7, 8, MASK, 9], [1, MASK, 6, 5, MASK], [1, 5, 6, 7, 8]])
POSITIONS = [3, 1, 0]  # the first [MASK], and the first token where there is none


def verbalizer(**kwargs):
    return make_verbalizer(tokenizer(), {0: "terrible", 1: "great"}, **kwargs)
