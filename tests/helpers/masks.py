"""Masks made by other means than ours."""

import numpy as np
import torch


def brute_force(scores, k):
    """Sort all (score, scrambled position) pairs in plain Python."""
    flat = scores.reshape(-1).tolist()
    ranked = sorted(range(len(flat)), key=lambda i: (-flat[i], (i * 2654435761) % 2**32))
    mask = torch.zeros(len(flat), dtype=torch.bool)
    mask[ranked[:k]] = True
    return mask.view(scores.shape)


def uneven_mask(rows, columns, seed=0):
    """Dense and empty rows and columns, as training leaves them."""
    generator = np.random.default_rng(seed)
    share = np.outer(generator.random(rows) ** 3, generator.random(columns) ** 2)
    return torch.from_numpy(generator.random((rows, columns)) < share)
