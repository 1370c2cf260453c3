"""Seeded trainings of tiny models, one for every method and variant, and what is recorded of their masks.

`tests/fixtures/make_fixtures.py` wrote down what they gave before the package was redesigned.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Optional

import torch
from peft import PeftModel, get_peft_model

from helpers.models import make_bert, make_llama
from peft_prune import (
    DSEEConfig,
    MovementPruningConfig,
    PPruningConfig,
    SMPConfig,
    calibrate,
    create_pruning_optimizer,
    finalize,
    update_schedule,
)
from peft_prune.layers.layer import pruning_layers


STEPS, STOPPED = 12, 7


def bert(seed=0):
    """Weights large enough for every one of them to matter."""
    return make_bert(seed=seed, initializer_range=0.2)


def bert_with_zeros(seed=0):
    """Half of the weights of each matrix inside the blocks are zero."""
    model = bert(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".layer." in name and parameter.dim() == 2:
                parameter[parameter.abs() < parameter.abs().median()] = 0
    return model


def llama(seed=0):
    return make_llama(seed=seed, initializer_range=0.2)


BASES: dict[str, Callable[..., Any]] = {"bert": bert, "bert-with-zeros": bert_with_zeros, "llama": llama}


@dataclass(frozen=True)
class Training:
    """A config, a base model by name, and the seed of base, adapter and data."""

    config: Callable[[], Any]
    base: str = "bert"
    seed: int = 0
    lr: float = 0.05


def smp(base="bert", seed=0, **fields):
    fields = {"sparsity": 0.6, "score_lr": 2.0, "penalty": 40.0, "preset": "encoder"} | fields
    return Training(lambda: SMPConfig(**_task(base) | fields), base, seed)


def movement(base="bert", seed=0, **fields):
    fields = ({"sparsity": 0.6} if fields.get("variant", "hard") in ("hard", "magnitude") else {}) | fields
    fields = {"score_lr": 2.0, "preset": "paper"} | fields
    return Training(lambda: MovementPruningConfig(**_task(base) | fields), base, seed)


def dsee(base="bert", seed=0, **fields):
    fields = {"r": 2, "lora_alpha": 4.0, "num_sparse": 5, "sparsity": 0.5, "preset": "paper"} | fields
    return Training(lambda: DSEEConfig(**_task(base) | fields), base, seed, lr=0.5)


def ppruning(base="bert", seed=0, **fields):
    fields = {"keep_ratio": 0.5, "sequence_length": 10, "num_tokens": 60, "lambda_ffn": 1.0} | fields
    return Training(lambda: PPruningConfig(**_task(base) | fields), base, seed)


def _task(base):
    return {"task_type": "CAUSAL_LM" if base == "llama" else "SEQ_CLS"}


TRAININGS = {
    "smp-local": smp(),
    "smp-score": smp(allocation="score"),
    "smp-global": smp(allocation="global"),
    "smp-no-penalty": smp(penalty=0.0),
    "smp-zeros": smp(score_init="zeros"),
    "smp-random": smp(score_init="random"),
    "smp-linear": smp(sparsity_schedule="linear", initial_sparsity=0.2, schedule_start=0.2, schedule_end=0.9),
    "smp-pattern": smp(allocation="global", sparsity_pattern={"query": 0.9, "intermediate.dense": 0.2}),
    "smp-2:4": smp(granularity="2:4", sparsity=0.5),
    "smp-head": smp(granularity="head", sparsity=0.5, target_modules=["query", "value", "attention.output.dense"]),
    "smp-16x16": smp(granularity="16x16", sparsity=0.5),
    "smp-4x4-score": smp(granularity="4x4", allocation="score"),
    "smp-row": smp(granularity="row"),
    "smp-column": smp(granularity="column"),
    "smp-interval": smp(mask_interval=3),
    "smp-global-interval": smp(allocation="global", mask_interval=3),
    "smp-low-rank": smp(score="low_rank", score_rank=3, allocation="score"),
    "smp-low-rank-zeros": smp(score="low_rank", score_rank=3, score_init="zeros"),
    "smp-low-rank-2:4": smp(score="low_rank", score_rank=3, granularity="2:4", sparsity=0.5),
    "smp-low-rank-interval": smp(score="low_rank", score_rank=3, allocation="global", mask_interval=3),
    "smp-llama-score": smp(base="llama", allocation="score"),
    "smp-llama-2:4": smp(base="llama", granularity="2:4", sparsity=0.5),
    "smp-llama-head": smp(base="llama", granularity="head", sparsity=0.5, target_modules=["q_proj", "o_proj"]),
    "movement-hard": movement(seed=1),
    "movement-hard-int8": movement(seed=1, value_dtype="int8"),
    "movement-hard-float16": movement(seed=1, value_dtype="float16"),
    "movement-hard-penalty": movement(penalty=40.0, allocation="score"),
    "movement-hard-global": movement(allocation="global"),
    "movement-hard-2:4": movement(granularity="2:4", sparsity=0.5),
    "movement-hard-head": movement(
        granularity="head", sparsity=0.5, target_modules=["query", "attention.output.dense"]
    ),
    "movement-hard-16x16": movement(granularity="16x16", sparsity=0.5),
    "movement-hard-interval": movement(mask_interval=3),
    "movement-hard-llama": movement(base="llama", allocation="score"),
    "movement-low-rank": movement(score="low_rank", score_rank=3),
    "movement-mask-only": movement(update="none"),
    "movement-soft": movement(variant="soft", threshold=0.4, penalty=170.0, score_lr=20.0),
    "movement-soft-interval": movement(variant="soft", threshold=0.4, penalty=170.0, score_lr=20.0, mask_interval=3),
    "movement-soft-4x4": movement(variant="soft", threshold=0.4, penalty=12.0, score_lr=20.0, granularity="4x4"),
    "movement-l0": movement(variant="l0", score_init=0.0, penalty=1000.0, score_lr=20.0),
    "movement-l0-interval": movement(variant="l0", score_init=0.0, penalty=1000.0, score_lr=20.0, mask_interval=3),
    "movement-magnitude": movement(variant="magnitude"),
    "movement-magnitude-global": movement(variant="magnitude", allocation="global"),
    "movement-magnitude-2:4": movement(variant="magnitude", granularity="2:4", sparsity=0.5),
    "movement-magnitude-interval": movement(variant="magnitude", mask_interval=3),
    "movement-zeros": movement(base="bert-with-zeros", from_existing_zeros=True, sparsity=None),
    "dsee": dsee(),
    "dsee-effective": dsee(importance="effective", update_sparsity=0.7),
    "dsee-weight": dsee(importance="weight", support="magnitude"),
    "dsee-units": dsee(sparsity=0.0, heads_to_prune=1, neuron_sparsity=0.25),
    "dsee-both": dsee(heads_to_prune=2, neuron_sparsity=0.5, support="random", prune_at=0.75),
    "dsee-llama": dsee(base="llama"),
    "ppruning-similarity": ppruning(),
    "ppruning-greedy": ppruning(head_similarity="greedy", linkage="average", lambda_ffn=5.0),
    "ppruning-magnitude": ppruning(criterion="magnitude"),
    "ppruning-random": ppruning(criterion="random", seed=0),
    "ppruning-llama": ppruning(base="llama"),
}
# one for each way in which several processes find a mask
TOGETHER = ("smp-local", "smp-score", "smp-low-rank-interval", "movement-hard", "movement-soft", "movement-l0",
            "movement-magnitude-global", "dsee-both", "ppruning-similarity")  # fmt: skip


def batches(training: Training, count: int = STEPS, rows: int = 8) -> list[dict[str, torch.Tensor]]:
    """Random token ids of 10 tokens, with random labels, or for a language model with themselves."""
    generator = torch.Generator().manual_seed(100 + training.seed)
    found = []
    for _ in range(count):
        ids = torch.randint(2, 90, (rows, 10), generator=generator)
        labels = torch.randint(0, 2, (rows,), generator=generator)
        found.append({"input_ids": ids, "labels": ids if training.base == "llama" else labels})
    return found


def start(training: Training) -> PeftModel:
    """The base model with a new adapter."""
    base = BASES[training.base](training.seed)
    torch.manual_seed(training.seed)
    return get_peft_model(base, training.config())


def train(
    training: Training,
    model: Any,
    first: int = 0,
    last: int = STEPS,
    share: slice = slice(None),
    wrap: Callable[[Any], Any] = lambda model: model,
    disturb: Optional[Callable[[torch.Tensor], None]] = None,
) -> list[str]:
    """Train a model from one optimizer step to another, without making its masks final.

    Args:
        training ([`Training`]): what to do.
        model: what [`start`] returns, or a checkpoint that was loaded again.
        first (`int`): steps done before. The schedule is set for it, as before any training.
        last (`int`): steps done afterwards.
        share (`slice`): rows of each batch that this process takes.
        wrap: called with the model; what it returns is called in the training.
        disturb: called with each gradient, to see whether rounding matters.

    Returns:
        `list[str]`: the first digits of the masks' hash after each call of `update_schedule`.
    """
    if isinstance(training.config(), PPruningConfig):
        calibrate(model, [{"input_ids": batch["input_ids"][share]} for batch in batches(training, 4)])
        return [digest(masks(model))[:8]]
    model.train()
    optimizer = create_pruning_optimizer(model, training.lr, optimizer_cls=torch.optim.SGD)
    update_schedule(model, first, STEPS)
    seen, wrapped = [digest(masks(model))[:8]], wrap(model)
    for step in range(first, last):
        batch = {name: tensor[share] for name, tensor in batches(training)[step].items()}
        wrapped(**batch).loss.backward()
        for parameter in model.parameters() if disturb else ():
            if parameter.grad is not None:
                disturb(parameter.grad)
        optimizer.step()
        optimizer.zero_grad()
        update_schedule(model, step + 1, STEPS)
        seen.append(digest(masks(model))[:8])
    return seen


def close(training: Training, model: Any) -> None:
    """The end of a training: its masks become final."""
    if not isinstance(training.config(), PPruningConfig):
        finalize(model)
    model.eval()


def masks(model: Any) -> dict[str, torch.Tensor]:
    """The mask in force of each pruned module: bool, shape (out, in)."""
    names = {layer.module_name: layer for layer in pruning_layers(model)}
    return {name: layer.get_mask(layer.active_adapters[0]).detach().clone() for name, layer in sorted(names.items())}


def digest(tensors: dict[str, torch.Tensor]) -> str:
    """SHA-256 of tensors with their names and shapes."""
    found = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        found.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        found.update(tensor.detach().contiguous().view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


def digest_record(config: Any) -> dict[str, str]:
    """SHA-256 of each field of `mask_info`, over all modules, without the values' checksum, which rounding changes."""
    fields: dict[str, list[str]] = {}
    for module, info in sorted(config.mask_info.items()):
        for name, value in sorted(info.items()):
            if name == "values":
                value = {k: v for k, v in sorted(value.items()) if k != "crc32"}
            fields.setdefault(name, []).append(f"{module} {value!r}")
    return {name: hashlib.sha256("\n".join(lines).encode()).hexdigest() for name, lines in fields.items()}


def run(training: Training, **how: Any) -> dict[str, Any]:
    """A whole training, and what is recorded of it."""
    model = start(training)
    seen = train(training, model, **how)
    close(training, model)
    return record(model, seen)


def record(model: Any, seen: list[str]) -> dict[str, Any]:
    """What is recorded of a training: hashes of the final masks, of their record, of the masks after each step."""
    config = model.peft_config["default"]
    found = masks(model)
    size, kept = sum(m.numel() for m in found.values()), sum(int(m.sum()) for m in found.values())
    return {
        "masks": digest(found),
        "record": digest_record(config),
        "kept": f"{kept} of {size}",
        "steps": seen,
    }
