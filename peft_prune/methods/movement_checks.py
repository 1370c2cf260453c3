"""Which fields of movement pruning go together."""

from __future__ import annotations

from typing import Any, Optional

from ..importance.calibrated_start import CALIBRATED_STARTS
from .movement_variants import PAPERS_THRESHOLD


def check_start(config: Any) -> None:
    """Raise `ValueError` if scores are to start where nothing of the kind is learned."""
    if config.score_init in CALIBRATED_STARTS and (not config.learns_scores() or config.mask == "l0"):
        raise ValueError(
            f"score_init={config.score_init!r} cannot be used with score={config.score!r}, mask={config.mask!r}, "
            f"from_existing_zeros={config.from_existing_zeros!r}, where no ranking is learned. Leave it out."
        )


def check_combination(config: Any, density: Optional[float]) -> None:
    """Raise `ValueError` if fields contradict each other; `density` is what was passed for it."""
    if config.score == "magnitude" and config.mask != "topk":
        raise ValueError(f"mask={config.mask!r} needs learned scores. Use mask='topk' with score='magnitude'.")
    if config.score == "low_rank" and config.mask == "l0":
        raise ValueError("mask='l0' gives each weight a gate of its own. Use score='movement' with it.")
    if config.score == "low_rank" and config.from_existing_zeros:
        raise ValueError("score='low_rank' has nothing to decide with from_existing_zeros=True. Leave one of them out.")
    if config.update == "low_rank" and config.mask == "l0":
        raise ValueError(
            "update='low_rank' keeps the base weights, which mask='l0' scales by gates. Use update='full' with it."
        )
    imported = config.from_existing_zeros and config.finalized  # a mask of mask_from_zeros, which nobody trained
    if (
        config.update == "none"
        and not imported
        and (config.score == "magnitude" or config.mask == "l0" or config.from_existing_zeros)
    ):
        raise ValueError(
            f"update='none' leaves nothing to train, or gates with nowhere to go, with score={config.score!r}, mask="
            f"{config.mask!r}, from_existing_zeros={config.from_existing_zeros!r}. Use update='full'."
        )
    if config.update != "full" and config.value_dtype != "float32" and not config.finalized:
        raise ValueError(
            f"value_dtype={config.value_dtype!r} has no effect with update={config.update!r}, which stores no values "
            "of kept weights. Leave it out, or use update='full'."
        )
    if config.from_existing_zeros:
        config.refuse_sparsity(density, "the zeros of the base decide how much is removed. Leave it out.")
    elif config.mask == "l0" or (config.mask == "threshold" and not config.moves_threshold(density)):
        fix = " Leave it out, or use preset='auto'." if config.mask == "threshold" else " Leave it out."
        config.refuse_sparsity(density, f"the penalty decides how much is removed.{fix}")
    if config.moves_threshold(density) and config.threshold != PAPERS_THRESHOLD and not config.finalized:
        raise ValueError(
            f"threshold={config.threshold!r} has no effect with sparsity={config.sparsity!r}, density={density!r}: the "
            "threshold is moved to where that is reached. Leave one of them out."
        )
    shared_out = config.allocation != "local" or config.sparsity_pattern
    if config.from_existing_zeros and not config.finalized and shared_out:
        raise ValueError(
            f"allocation={config.allocation!r} and sparsity_pattern={config.sparsity_pattern!r} have no effect with "
            "from_existing_zeros=True: the zeros of the base decide what each matrix keeps. Leave them out."
        )
    if config.mask != "topk" and (shared_out or ":" in config.granularity):
        raise ValueError(
            f"mask={config.mask!r} lets scores decide by themselves how much each matrix keeps, so allocation="
            f"{config.allocation!r}, sparsity_pattern={config.sparsity_pattern!r} and granularity="
            f"{config.granularity!r} must not fix it. Leave them at their defaults."
        )


def check_in_stages(config: Any) -> None:
    """Raise `ValueError` if what is solved at a few steps of training is asked for what it has no place for."""
    alone = {"mask": "topk", "update": "full", "allocation": "local", "initial_sparsity": 0.0, "mask_interval": 1}
    for name, only in alone.items():
        if getattr(config, name) != only and not config.finalized:
            raise ValueError(
                f"{name}={getattr(config, name)!r} cannot be used with score='sparsegpt', which removes weights at a "
                f"few steps of training and gives those that stay new values. Use {name}={only!r}, or another variant."
            )
    if config.from_existing_zeros:
        raise ValueError(
            "score='sparsegpt' has nothing to decide with from_existing_zeros=True. Leave one of them out."
        )
    if config.granularity != "weight" and ":" not in config.granularity:
        raise ValueError(
            f"granularity={config.granularity!r} cannot be used with score='sparsegpt', which solves for single "
            "weights. Use 'weight', or an n:m pattern such as '2:4'."
        )
