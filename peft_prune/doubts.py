"""Why a training is unlikely to work as it is set up. Limits are those of runs in `benchmarks/results`."""

from __future__ import annotations

import math
from typing import Any, Optional

from .importance.hard_concrete import OPEN_ABOVE


# methods_accuracy.jsonl, first_runs.jsonl: after 160 steps at 90 % movie sentences are 7 points and more below dense
# fine-tuning, and after 300 steps STS-B is not learned at all by methods that choose weights by learned scores or sizes
FEW_STEPS, HIGH_SPARSITY = 300, 0.9
# dsee_accuracy.jsonl: 120 steps after half of the weights went at once, STS-B is at 30 where LoRA has 79
STEPS_AFTER_ONCE, SPARSITY_AT_ONCE = 120, 0.5
# methods_accuracy.jsonl and methods_probes.jsonl, learned scores: 1e-2 to 1e-1; a factor of ten beyond them
SCORE_LR = (1e-3, 1.0)
# ten times less and more than what was trained with: 1e-4 for all weights (methods_accuracy.jsonl), 1e-3 to 2e-3 for
# factors (learned_perplexity.jsonl, dsee_accuracy.jsonl)
WEIGHT_LR, FACTOR_LR = (1e-5, 1e-3), (1e-4, 2e-2)
# methods_probes.jsonl: soft kept 0.8 % at 5000; methods_accuracy.jsonl: 475 is the largest that was tried for L0
LARGE_PENALTY = {"threshold": 5000.0, "l0": 475.0}


def of_steps(sparsity: Optional[float], total_steps: int) -> list[str]:
    """Too few steps for a sparsity."""
    if sparsity is None or sparsity < HIGH_SPARSITY or total_steps > FEW_STEPS:
        return []
    return [
        f"total_steps={total_steps} is likely too few for sparsity={sparsity:g}: within {FEW_STEPS} steps at "
        f"{HIGH_SPARSITY:g} methods of this kind learned some tasks and failed on others. Use "
        "MovementPruningConfig(variant='sparsegpt'), which is made for few steps, train for longer, or lower the "
        "sparsity."
    ]


def of_pruning_at_once(sparsity: float, steps_left: int, prune_at: float) -> list[str]:
    """Too few steps after much was pruned at once."""
    if sparsity < SPARSITY_AT_ONCE or steps_left > STEPS_AFTER_ONCE:
        return []
    return [
        f"prune_at={prune_at:g} leaves {steps_left} steps after sparsity={sparsity:g} is reached at once, and "
        f"{STEPS_AFTER_ONCE} were too few for {SPARSITY_AT_ONCE:g}. Prune in stages with prune_from=0.0, or train for "
        "more steps."
    ]


def of_rate(name: str, rate: Optional[float], limits: tuple[float, float], of_what: str) -> list[str]:
    """A learning rate far from those that are known to work."""
    low, high = limits
    if rate is None or low <= rate <= high:
        return []
    too = "low" if rate < low else "high"
    return [f"{name}={rate:g} is likely too {too} for {of_what}. Use one between {low:g} and {high:g}."]


def of_penalty(config: Any, total_steps: int, decays: bool) -> list[str]:
    """A penalty that removes nothing, or everything, where it decides how much is removed.

    Args:
        config ([`MovementPruningConfig`]): with `mask="threshold"` or `"l0"`, and no sparsity to reach.
        total_steps (`int`): of the training.
        decays (`bool`): whether the learning rate decays to 0, so that scores move half as far.
    """
    instead = ", or give variant='soft' a sparsity instead"
    if not config.penalty:
        return [f"penalty={config.penalty!r} draws no score down, so little will be removed. Raise it{instead}."]
    if config.penalty > LARGE_PENALTY[config.mask]:
        known = LARGE_PENALTY[config.mask]
        return [
            f"penalty={config.penalty:g} is likely to remove nearly all weights: {known:g} has left a few percent or "
            f"less. Lower it{instead}."
        ]
    start = config.score_init if isinstance(config.score_init, (int, float)) else 0.0  # the lowest of magnitudes
    tau = config.threshold
    limit = OPEN_ABOVE if config.mask == "l0" else math.log(tau / (1 - tau)) if tau > 0 else -math.inf
    way = config.score_lr * total_steps * (0.5 if decays else 1.0)
    if start - way < limit:
        return []
    return [
        f"score_lr={config.score_lr:g} moves a score by {way:.2g} at most in {total_steps} steps. Scores start at "
        f"{start:.3g} and are removed below {limit:.3g}, so nothing will be. Raise score_lr, train for more "
        f"steps{instead}."
    ]
