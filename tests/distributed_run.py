"""What each process of tests/test_distributed.py runs: short trainings that record the masks after every step.

A first launch of two processes is killed in the middle of trainings; the second resumes from their checkpoints, and
does everything else.
"""

import os
import signal
import sys
from pathlib import Path

import torch
from accelerate.state import AcceleratorState, DistributedType, PartialState
from conftest import make_bert
from peft import get_peft_model
from test_dsee import SMALL
from test_movement import sparse_base
from test_ppruning import batches
from test_training import Record, arguments, data

from peft_prune import (
    DSEEConfig,
    MovementPruningConfig,
    PPruningConfig,
    PruningCallback,
    PruningTrainer,
    SMPConfig,
    calibrate,
    penalty,
)
from peft_prune.tuners.layer import pruning_layers


SPARSE = {"task_type": "SEQ_CLS", "sparsity": 0.8}
CONFIGS = {
    "local": lambda: SMPConfig(**SPARSE, allocation="local", penalty=0.0),
    "score": lambda: SMPConfig(**SPARSE, allocation="score"),
    "global": lambda: SMPConfig(**SPARSE, allocation="global"),
    "hard": lambda: MovementPruningConfig(**SPARSE, granularity="4x4"),
    "soft": lambda: MovementPruningConfig(variant="soft", task_type="SEQ_CLS", allocation="local"),
    "l0": lambda: MovementPruningConfig(variant="l0", task_type="SEQ_CLS"),
    "magnitude": lambda: MovementPruningConfig(**SPARSE, variant="magnitude", allocation="global"),
    "zeros": lambda: MovementPruningConfig(from_existing_zeros=True, task_type="SEQ_CLS"),
    "dsee": lambda: DSEEConfig(task_type="SEQ_CLS", sparsity=0.5, prune_at=0.5, **SMALL),
    "dsee-units": lambda: DSEEConfig(task_type="SEQ_CLS", heads_to_prune=1, neuron_sparsity=0.25, **SMALL),
}
BLOCKS = {"transformer_layer_cls_to_wrap": ["BertLayer"]}
STRATEGIES = ("ddp", "fsdp")
REFUSED = {
    "fsdp1": BLOCKS | {"version": 1, "use_orig_params": True, "sync_module_states": False},
    "checkpointing": BLOCKS | {"activation_checkpointing": True},
    "linears": {"transformer_layer_cls_to_wrap": ["Linear"]},
}
STEPS, SAVED, KILLED = 6, 3, 4
WORLD = int(os.environ.get("WORLD_SIZE", "1"))


def allow_fsdp_on_cpu():
    """Accelerate turns FSDP on where there are GPUs, and trains with DDP on a CPU without a word."""
    original = AcceleratorState.__init__

    def init(self, *args, fsdp_plugin=None, **kwargs):
        original(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
        if fsdp_plugin is not None:
            self.fsdp_plugin, self.distributed_type, self.device = (
                fsdp_plugin,
                DistributedType.FSDP,
                torch.device("cpu"),
            )
            PartialState._shared_state |= {"distributed_type": DistributedType.FSDP, "device": torch.device("cpu")}

    AcceleratorState.__init__ = init


def zero(stage, batch_size):
    """Configuration of DeepSpeed for a float32 training."""
    return {
        "zero_optimization": {"stage": stage, "stage3_gather_16bit_weights_on_model_save": True},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "train_micro_batch_size_per_gpu": batch_size,
        "gradient_accumulation_steps": 1,
    }


class Watch(Record):
    """Masks after each step; whether anything is sharded; under DDP what DSEE trains; and the interruption."""

    def __init__(self, interrupt):
        super().__init__()
        self.interrupt, self.sharded, self.trained, self.penalties = interrupt, False, [], []

    def on_step_end(self, args, state, control, model=None, **kwargs):
        super().on_step_end(args, state, control, model=model)
        layers = pruning_layers(model)
        self.sharded = any(hasattr(p, "ds_id") or hasattr(p, "full_tensor") for p in (layer.weight for layer in layers))
        dsee = [layer for layer in layers if "A" in layer.trained_names and layer.held("A") and not self.sharded]
        self.trained.append([layer.held(k)["default"].detach().clone() for layer in dsee for k in ("A", "B", "sparse")])
        self.penalties.append(penalty(model))
        if self.interrupt and state.global_step == KILLED:
            raise KeyboardInterrupt


def train(folder, name, strategy, batch_size, interrupt=False, resume=None, **changes):
    torch.manual_seed(0)
    config = CONFIGS[name]()
    model = get_peft_model(sparse_base() if name == "zeros" else make_bert(), config)
    if strategy.startswith("zero"):
        changes |= {"deepspeed": zero(int(strategy[-1]), batch_size), "use_cpu": False}
    elif strategy != "ddp":
        changes |= {"fsdp": True, "fsdp_config": dict(REFUSED.get(strategy, BLOCKS))}
    args = arguments(folder, max_steps=STEPS, per_device_train_batch_size=batch_size, max_grad_norm=0.0, **changes)
    watch = Watch(interrupt)
    callbacks = [PruningCallback(), watch]
    trainer = PruningTrainer(model=model, args=args, train_dataset=data(32), callbacks=callbacks)
    trainer.train(resume_from_checkpoint=resume)
    return trainer, watch


def record(folder, name, strategy, batch_size, suffix="", **changes):
    trainer, watch = train(folder / "out", name, strategy, batch_size, **changes)
    rank, world = trainer.args.process_index, trainer.args.world_size
    masks = [torch.cat([mask.reshape(-1) for mask in step.values()]) for _, step in watch.steps]
    ids = {"input_ids": torch.arange(2, 26).view(3, 8)}
    with torch.no_grad():
        logits = trainer.model_wrapped.eval()(**ids).logits
    found = {"world": world, "masks": masks, "sharded": watch.sharded, "trained": watch.trained, "logits": logits,
             "penalties": watch.penalties, "steps": [step for step, _ in watch.steps]}  # fmt: skip
    torch.save(found, folder / f"{strategy}-{name}{suffix}-{rank}-of-{world}.pt")
    trainer.save_model(str(folder / f"{strategy}-{name}{suffix}-adapter-of-{world}"))


def refused(folder):
    """What each wrapping that is refused says, and when."""
    said = {}
    for strategy in REFUSED:
        try:
            train(folder / "out", "local", strategy, 16)
        except ValueError as error:
            said[strategy] = str(error)
    torch.save(said, folder / f"refused-{PartialState().process_index}.pt")


def calibrated(folder):
    """P-pruning, of data that is another in each process."""
    rank = PartialState().process_index
    torch.manual_seed(0)
    model = get_peft_model(make_bert(), PPruningConfig(keep_ratio=0.6, num_tokens=40, sequence_length=10))
    calibrate(model, batches()[2 * rank :])
    masks = torch.cat([layer.get_mask("default").flatten() for layer in pruning_layers(model)])
    torch.save({"masks": masks}, folder / f"ppruning-{rank}.pt")


def killed(folder, batch_size, strategies):
    """Trainings that stop after a checkpoint; then the process is gone, and with it all that it knew."""
    for strategy in strategies:
        try:
            saving = {"save_strategy": "steps", "save_steps": SAVED}
            train(folder / f"{strategy}-killed", "score", strategy, batch_size, interrupt=True, **saving)
        except KeyboardInterrupt:
            pass
    os.kill(os.getpid(), signal.SIGKILL)


def everything(folder, batch_size, strategies):
    for strategy in strategies:
        for name in CONFIGS:
            record(folder, name, strategy, batch_size)
        checkpoint = folder / f"{strategy}-killed" / f"checkpoint-{SAVED}"
        if checkpoint.exists():
            record(folder, "score", strategy, batch_size, suffix="-resumed", resume=str(checkpoint))
    calibrated(folder)
    if WORLD > 1:
        refused(folder)


if __name__ == "__main__":
    allow_fsdp_on_cpu()
    what = {"killed": killed, "everything": everything}[sys.argv[1]]
    what(Path(sys.argv[2]), int(sys.argv[3]), sys.argv[4:])
