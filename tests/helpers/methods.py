"""One adapter of every method, brought to where it prunes."""

import torch
from peft import get_peft_model

from helpers.models import make_bert
from peft_prune import (
    DSEEConfig,
    MovementPruningConfig,
    PPruningConfig,
    SMPConfig,
    SparseGPTConfig,
    StructuredPruningConfig,
    WandaConfig,
    calibrate,
    create_pruning_optimizer,
    finalize,
    update_schedule,
)
from peft_prune.layers.layer import pruning_layers


METHODS = ("smp", "movement", "dsee", "ppruning", "structured", "wanda", "sparsegpt")
TRAINED, CALIBRATED = METHODS[:3], METHODS[3:]
OF_UNITS = ("ppruning", "structured")  # what heads and neurons end in is all that they prune


def config(method, **fields):
    """A config that prunes enough to be seen."""
    if method == "smp":
        return SMPConfig(**{"sparsity": 0.6, "preset": "encoder"} | fields)  # no inputs to start from
    if method == "movement":
        return MovementPruningConfig(**{"sparsity": 0.6} | fields)
    if method == "dsee":
        # what is updated is pruned, too, where targets are named
        return DSEEConfig(
            **{"r": 2, "num_sparse": 3, "sparsity": 0.5, "prune_target_modules": fields.get("target_modules")} | fields
        )
    if method == "sparsegpt":
        return SparseGPTConfig(**{"sparsity": 0.5, "value_dtype": "float32", "num_samples": 4} | fields)
    if method == "wanda":
        return WandaConfig(**{"sparsity": 0.5, "num_samples": 4} | fields)
    if method == "structured":
        own = {"keep_ratio": 0.5, "sequence_length": 9, "value_dtype": "float32", "num_samples": 4}
        return StructuredPruningConfig(**own | fields)
    return PPruningConfig(**{"criterion": "random", "keep_ratio": 0.5} | fields)


def inputs_of(model):
    """Two batches of random tokens."""
    generator = torch.Generator().manual_seed(5)
    return [{"input_ids": torch.randint(3, model.config.vocab_size, (2, 9), generator=generator)} for _ in range(2)]


def advance(model, method, name=None):
    """To the end of the schedule, with an update that is not zero; final only if the method is calibrated."""
    if method in CALIBRATED:
        calibrate(model, None if method == "ppruning" else inputs_of(model), name)
        return model
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for layer in pruning_layers(model):
            for kind in ("update", "B", "sparse"):
                for parameter in layer.held(kind).values() if kind in layer.trained_names else ():
                    parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    update_schedule(model, 10, 10)
    return model


def adapter(base, method, final=True, **fields):
    """A model with an adapter of the method."""
    model = advance(get_peft_model(base, config(method, **fields)), method)
    if final and method in TRAINED:
        finalize(model)
    return model.eval()


def effective(layer, name="default"):
    """The weight that an adapter makes, as (out, in), from what the layer holds."""
    return layer.adapted(name, layer.matrix).detach()


def randomize_scores(model, seed=0, name="default"):
    generator = torch.Generator().manual_seed(seed)
    for layer in pruning_layers(model, name):
        with torch.no_grad():
            layer.scores[name].copy_(torch.randn(layer.shape, generator=generator))


def prune(base, at=0.7, **fields):
    """A model with random scores at its final sparsity."""
    fields = {"sparsity": at} | fields
    model = get_peft_model(base, SMPConfig(**fields))
    randomize_scores(model)
    update_schedule(model, 10, 10)
    return model


def final_adapter(folder, at=0.5, make=make_bert, **fields):
    """Save a final adapter of a random mask, and return the masked model."""
    model = prune(make(), at, **fields)
    finalize(model)
    model.save_pretrained(folder)
    return model


def smp_bert(**fields):
    return get_peft_model(make_bert(), SMPConfig(**{"task_type": "SEQ_CLS", "sparsity": 0.9} | fields))


def train(model, steps=6, lr=1e-2):
    model.train()
    optimizer = create_pruning_optimizer(model, lr=lr)
    update_schedule(model, 0, steps)
    for step in range(steps):
        generator = torch.Generator().manual_seed(step)
        ids = torch.randint(3, 120, (8, 9), generator=generator)
        model(input_ids=ids, labels=ids[:, 0] % 2).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        update_schedule(model, step + 1, steps)
    return model.eval()


SMALL = {"r": 3, "lora_alpha": 6.0, "num_sparse": 7, "preset": "paper"}
