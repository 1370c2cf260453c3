"""Weights and inputs of one layer for solvers, and what their masks have to look like."""

import torch

from peft_prune.solvers import add_inputs
from peft_prune.solvers.pattern import choose


PATTERNS = [0.5, 0.7, (2, 4), (4, 8)]


def problem(rows=48, columns=64, tokens=256, seed=0, dtype=torch.float32):
    """A weight, and inputs that depend on each other and differ in size: (rows, columns), (tokens, columns)."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(columns, columns, generator=generator) / columns**0.5
    sizes = torch.randn(columns, generator=generator).exp()
    falling = torch.arange(1, columns + 1) ** -0.7
    x = (torch.randn(tokens, columns, generator=generator) * falling) @ mix * sizes
    return torch.randn(rows, columns, generator=generator).to(dtype), x.to(dtype)


def gram_of(x, dtype=torch.float64):
    return add_inputs(torch.zeros(x.shape[-1], x.shape[-1], dtype=dtype), x)


def wanda_mask(weight, gram, pattern):
    return choose(weight.abs() * gram.diagonal().to(weight).sqrt(), pattern)


def assert_pattern(mask, pattern):
    if isinstance(pattern, tuple):
        assert (mask.view(-1, pattern[1]).sum(1) == pattern[0]).all()
    else:
        assert (mask.sum(1) == round((1 - pattern) * mask.shape[1])).all()
