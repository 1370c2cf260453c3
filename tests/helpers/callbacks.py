"""Callbacks that look into a training."""

from transformers import TrainerCallback

from peft_prune.layers.layer import pruning_layers


class Record(TrainerCallback):
    """Masks and step after each step; added last, so it sees what the next forward will use."""

    def __init__(self):
        self.steps = []

    def on_step_end(self, args, state, control, model=None, **kwargs):
        masks = {m.module_name: m.get_mask("default").clone() for m in pruning_layers(model)}
        self.steps.append((state.global_step, masks))


class Gradients(TrainerCallback):
    """What the optimizer is given at the second step, when the penalty is on."""

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        if state.global_step == 1:
            self.seen = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
