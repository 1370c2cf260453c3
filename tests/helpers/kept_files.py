"""Which adapters are in tests/fixtures/before_redesign, and what is recorded of each."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from helpers.trainings import BASES, TRAININGS, Training, batches, digest, dsee, masks, movement, smp
from peft_prune.layers.layer import pruning_layers


KEPT = Path(__file__).parents[1] / "fixtures" / "before_redesign"
FINAL = {
    "smp-local": TRAININGS["smp-local"],
    "smp-2:4": TRAININGS["smp-2:4"],
    "smp-head": TRAININGS["smp-head"],
    "smp-low-rank": TRAININGS["smp-low-rank"],
    "smp-llama": TRAININGS["smp-llama-score"],
    "movement-hard": TRAININGS["movement-hard"],
    "movement-int8": TRAININGS["movement-hard-int8"],
    "movement-float16-blocks": movement(value_dtype="float16", granularity="16x16", sparsity=0.5),
    "movement-mask-only": TRAININGS["movement-mask-only"],
    "movement-soft": TRAININGS["movement-soft"],
    "movement-l0": TRAININGS["movement-l0"],
    "movement-magnitude": TRAININGS["movement-magnitude"],
    "movement-zeros": TRAININGS["movement-zeros"],
    "dsee": TRAININGS["dsee"],
    "dsee-units": TRAININGS["dsee-units"],
    "ppruning-random": TRAININGS["ppruning-random"],
    "ppruning-similarity": TRAININGS["ppruning-similarity"],
}
# one block only, which keeps the files small; stopped after 7 of 12 steps
_BLOCK = {"layers_to_transform": [1]}
CHECKPOINTS = {
    "checkpoint-smp": smp(**_BLOCK),
    "checkpoint-smp-low-rank": smp(score="low_rank", score_rank=3, allocation="score"),
    "checkpoint-movement-hard": movement(**_BLOCK),
    "checkpoint-movement-l0": replace(
        TRAININGS["movement-l0"], config=lambda: replace(TRAININGS["movement-l0"].config(), layers_to_transform=[1])
    ),
    "checkpoint-movement-magnitude": movement(variant="magnitude", **_BLOCK),
    "checkpoint-dsee": dsee(),  # pruned at step 6
    "checkpoint-dsee-before": dsee(prune_at=0.75),  # at step 9
}
COMPACT = "compact"  # what merging "ppruning-similarity" leaves


def folder(name: str) -> Path:
    """Where an adapter is kept; Windows has no colons in names."""
    return KEPT / name.replace(":", "to")


def outputs(training: Training, model: Any) -> torch.Tensor:
    """Logits for 4 rows of tokens, of a language model those of the last one."""
    model.eval()
    with torch.no_grad():
        found = model(input_ids=batches(training, 1)[0]["input_ids"][:4]).logits
    return found[:, -1] if found.dim() == 3 else found


def describe(training: Training, model: Any) -> dict[str, Any]:
    """Logits, and the hash of each mask."""
    return {
        "logits": outputs(training, model).tolist(),
        "masks": {name: digest({"mask": mask}) for name, mask in masks(model).items()},
    }


def merged_values(model: Any) -> dict[str, str]:
    """Hash of what each matrix becomes where an adapter has values of its own, and so does not depend on the base."""
    return {
        layer.module_name: digest({"weight": layer.adapted(layer.active_adapters[0], layer.matrix).detach()})
        for layer in pruning_layers(model)
        if layer.active_adapters[0] in layer.values
    }


def new_base(training: Training) -> Any:
    return BASES[training.base](training.seed)
