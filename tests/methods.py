"""One adapter of every method, brought to where it prunes."""

import torch
from peft import get_peft_model

from peft_prune import (
    DSEEConfig,
    MovementPruningConfig,
    PPruningConfig,
    SMPConfig,
    calibrate,
    finalize,
    update_schedule,
)
from peft_prune.tuners.layer import pruning_layers


METHODS = ("smp", "movement", "dsee", "ppruning")
TRAINED = METHODS[:3]


def config(method, **fields):
    """A config that prunes enough to be seen."""
    if method == "smp":
        return SMPConfig(**{"sparsity": 0.6} | fields)
    if method == "movement":
        return MovementPruningConfig(**{"sparsity": 0.6} | fields)
    if method == "dsee":
        # what is updated is pruned, too, where targets are named
        return DSEEConfig(
            **{"r": 2, "num_sparse": 3, "sparsity": 0.5, "prune_target_modules": fields.get("target_modules")} | fields
        )
    return PPruningConfig(**{"criterion": "random", "keep_ratio": 0.5} | fields)


def advance(model, method):
    """To the end of the schedule, with an update that is not zero; the adapter is not final yet."""
    if method == "ppruning":
        calibrate(model)
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
    if final and method != "ppruning":
        finalize(model)
    return model.eval()


def effective(layer, name="default"):
    """The weight that an adapter makes, as (out, in), from what the layer holds."""
    return layer.adapted(name, layer.matrix).detach()
