"""What the variants of movement pruning are made of."""

from __future__ import annotations

from typing import Any


# What each variant is made of in the paper (sections 3 and 4, and appendix A.1)
COMMON = {"sparsity_schedule": "cubic", "schedule_start": 0.1, "schedule_end": 0.8, "num_samples": 128}
VARIANTS: dict[str, dict[str, Any]] = {
    "hard": {"score": "movement", "mask": "topk", "penalty": 0.0, "score_init": "zeros", "score_lr": 1e-2},
    "soft": {"score": "movement", "mask": "threshold", "penalty": 400.0, "score_init": "zeros", "score_lr": 1e-2},
    "l0": {"score": "movement", "mask": "l0", "penalty": 125.0, "score_init": 2.197, "score_lr": 1e-1},
    "magnitude": {"score": "magnitude", "mask": "topk", "penalty": 0.0, "score_init": "zeros", "score_lr": 1e-2},
    # not in the paper; shares of training are those that learned most of STS-B in 300 steps at 90 %
    "sparsegpt": {
        "score": "sparsegpt",
        "mask": "topk",
        "penalty": 0.0,
        "score_init": "zeros",
        "score_lr": 1e-2,
        "schedule_start": 0.2,
        "schedule_end": 0.6,
        "num_samples": 256,
    },
}
# What differs from it by default where scores reach a sparsity. From zeros a training of a few hundred steps prunes on
# the sign of its first gradients, so scores start where magnitudes rank the weights; more steps are left at the end;
# and with a threshold that is moved no penalty has to draw scores below it.
FEW_STEPS: dict[str, dict[str, Any]] = {
    "topk": {"score_init": "magnitude", "schedule_end": 0.7},
    "threshold": {"score_init": "magnitude", "schedule_end": 0.7, "penalty": 0.0},
}
SCORES, MASKS = ("movement", "low_rank", "magnitude", "sparsegpt"), ("topk", "threshold", "l0")
PAPERS_THRESHOLD = 0.1
STAGES = 3  # in which score="sparsegpt" removes weights
