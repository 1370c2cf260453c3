"""What tests/test_distributed.py runs: short trainings in one process and in two, with the masks after every step.

Two processes are killed in the middle of trainings; two others resume from the checkpoints, and do everything else.
What is slow is to import, so one process does that and all others are forked from it; the environment is torchrun's.

    python tests/distributed_run.py FOLDER ddp fsdp zero2 zero3  # with --short: only what the test runs
"""

import importlib.util
import multiprocessing
import os
import signal
import socket
import sys
from pathlib import Path

import torch
from accelerate.state import AcceleratorState, DistributedType, PartialState
from helpers.architectures import batches
from helpers.callbacks import Record
from helpers.data import arguments, data
from helpers.methods import SMALL
from helpers.models import make_bert, sparse_base
from peft import get_peft_model

from peft_prune import (
    DSEEConfig,
    MovementPruningConfig,
    PPruningConfig,
    PruningCallback,
    PruningTrainer,
    SMPConfig,
    SparseGPTConfig,
    StructuredPruningConfig,
    WandaConfig,
    calibrate,
    penalty,
)
from peft_prune.layers.layer import pruning_layers


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
    "low-rank": lambda: SMPConfig(**SPARSE, allocation="score", score="low_rank", score_rank=3, mask_interval=2),
    "start": lambda: SMPConfig(**SPARSE, allocation="row", score_init="wanda", num_samples=24),
    "stages": lambda: MovementPruningConfig(**SPARSE, variant="sparsegpt", num_samples=24),
    "dsee": lambda: DSEEConfig(task_type="SEQ_CLS", sparsity=0.5, prune_at=0.5, **SMALL),
    "dsee-units": lambda: DSEEConfig(task_type="SEQ_CLS", heads_to_prune=1, neuron_sparsity=0.25, **SMALL),
}
# one for each way in which a mask is found
SHORT = ("local", "score", "soft", "magnitude", "zeros", "low-rank", "start", "stages", "dsee-units")
# look at training data once FSDP and DeepSpeed have split the weights: refused
WHOLE = ("start", "stages")
BLOCKS = {"transformer_layer_cls_to_wrap": ["BertLayer"]}
STRATEGIES = ("ddp", "fsdp", *(("zero2", "zero3") if importlib.util.find_spec("deepspeed") else ()))
REFUSED = {
    "fsdp1": BLOCKS | {"version": 1, "use_orig_params": True, "sync_module_states": False},
    "checkpointing": BLOCKS | {"activation_checkpointing": True},
    "linears": {"transformer_layer_cls_to_wrap": ["Linear"]},
}
STEPS, SAVED, KILLED = 4, 2, 3


def allow_fsdp_on_cpu():
    """Accelerate turns FSDP on where there are GPUs, and trains with DDP on a CPU without a word."""
    original = AcceleratorState.__init__

    def init(self, *args, fsdp_plugin=None, **kwargs):
        original(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
        if fsdp_plugin is not None:
            cpu = torch.device("cpu")
            self.fsdp_plugin, self.distributed_type, self.device = fsdp_plugin, DistributedType.FSDP, cpu
            PartialState._shared_state |= {"distributed_type": DistributedType.FSDP, "device": cpu}

    AcceleratorState.__init__ = init


def allow_deepspeed_on_cpu():
    """Accelerate has no backend for it there; and its kernel for all-reduce in shared memory would be compiled."""
    original = PartialState._prepare_backend

    def prepare(self, cpu, *args, **kwargs):
        if os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true":
            self.device = torch.device("cpu")
            return "gloo", DistributedType.MULTI_CPU
        return original(self, cpu, *args, **kwargs)

    PartialState._prepare_backend = prepare
    os.environ["DS_ACCELERATOR"] = "cpu"
    import deepspeed.comm  # noqa: F401

    sys.modules["deepspeed.comm.torch"].build_shm_op = lambda: None


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
    """Masks after each step, whether anything is sharded; and the interruption."""

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


def train(folder, name, strategy, interrupt=False, resume=None, **changes):
    torch.manual_seed(0)
    config = CONFIGS[name]()
    model = get_peft_model(sparse_base() if name == "zeros" else make_bert(), config)
    batch_size = 32 // int(os.environ.get("WORLD_SIZE", "1"))
    if strategy.startswith("zero"):
        # `use_cpu` would mean DDP
        changes |= {"deepspeed": zero(int(strategy[-1]), batch_size), "use_cpu": False}
    elif strategy != "ddp":
        changes |= {"fsdp": True, "fsdp_config": dict(REFUSED.get(strategy, BLOCKS))}
    settings = {"max_steps": STEPS, "per_device_train_batch_size": batch_size, "max_grad_norm": 0.0, "logging_steps": 2}
    watch = Watch(interrupt)
    callbacks = [PruningCallback(), watch]
    args = arguments(folder, **settings | changes)
    trainer = PruningTrainer(model=model, args=args, train_dataset=data(32), callbacks=callbacks)
    trainer.train(resume_from_checkpoint=resume)
    return trainer, watch


def record(folder, name, strategy, suffix="", **changes):
    trainer, watch = train(folder / "out", name, strategy, **changes)
    rank, world = trainer.args.process_index, trainer.args.world_size
    masks = [torch.cat([mask.reshape(-1) for mask in step.values()]) for _, step in watch.steps]
    logits = None
    if not strategy.startswith("zero"):  # Trainer has let go of DeepSpeed's engine
        with torch.no_grad():
            logits = trainer.model_wrapped.eval()(torch.arange(2, 26).view(3, 8)).logits
    found = {"world": world, "masks": masks, "sharded": watch.sharded, "trained": watch.trained, "logits": logits,
             "penalties": watch.penalties, "steps": [step for step, _ in watch.steps]}  # fmt: skip
    torch.save(found, folder / f"{strategy}-{name}{suffix}-{rank}-of-{world}.pt")
    trainer.save_model(str(folder / f"{strategy}-{name}{suffix}-adapter-of-{world}"))


def refused(folder):
    """What each wrapping that is refused says."""
    said = {}
    for strategy in REFUSED:
        try:
            train(folder / "out", "dsee", strategy)
        except ValueError as error:
            said[strategy] = str(error)
    torch.save(said, folder / f"refused-{PartialState().process_index}.pt")


def calibrated(folder):
    """P-pruning, of data that is another in each process."""
    rank = PartialState().process_index
    torch.manual_seed(0)
    pruned_by = {
        "ppruning": PPruningConfig(keep_ratio=0.6, num_tokens=40, sequence_length=10),
        "structured": StructuredPruningConfig(keep_ratio=0.6, sequence_length=10),
        "wanda": WandaConfig(sparsity=0.5),
        "sparsegpt": SparseGPTConfig(sparsity=0.5),
        "low rank": WandaConfig(sparsity=0.5, update="low_rank", r=3),
        "owl": SparseGPTConfig(sparsity=0.5, update="low_rank", r=3, allocation="owl"),
        "start": SMPConfig(sparsity=0.5, score_init="wanda", sparsity_schedule="constant"),
        "start of low rank": SMPConfig(
            sparsity=0.5, score="low_rank", score_rank=3, score_init="sparsegpt", sparsity_schedule="constant"
        ),
    }
    for method, config in pruned_by.items():
        model = get_peft_model(make_bert(), config)
        calibrate(model, batches()[2 * rank :])
        masks = torch.cat([layer.get_mask("default").flatten() for layer in pruning_layers(model)])
        weights = torch.cat(
            [layer.adapted("default", layer.matrix).detach().flatten() for layer in pruning_layers(model)]
        )
        torch.save({"masks": masks, "weights": weights}, folder / f"{method}-{rank}.pt")


def killed(folder, strategies):
    """Trainings that stop after a checkpoint; then the process is gone, and with it all that it knew."""
    for strategy in strategies:
        try:
            saving = {"save_strategy": "steps", "save_steps": SAVED}
            train(folder / f"{strategy}-killed", "score", strategy, interrupt=True, **saving)
        except KeyboardInterrupt:
            pass
    os.kill(os.getpid(), signal.SIGKILL)


def everything(folder, strategies, names):
    for strategy in strategies:
        for name in names:
            if strategy == "ddp" or name not in WHOLE:
                record(folder, name, strategy)
        checkpoint = folder / f"{strategy}-killed" / f"checkpoint-{SAVED}"
        if checkpoint.exists():
            record(folder, "score", strategy, suffix="-resumed", resume=str(checkpoint))
    if os.environ["WORLD_SIZE"] != "1":
        calibrated(folder)
        refused(folder)


def processes(count, what, *args):
    """Run a function in processes that torchrun might have started; returns their exit codes."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    common = {"WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}

    def run(rank):
        environment = common | {"RANK": rank, "LOCAL_RANK": rank} if count > 1 else {"WORLD_SIZE": 1}
        os.environ.update({name: str(value) for name, value in environment.items()})
        what(*args)

    started = [multiprocessing.get_context("fork").Process(target=run, args=(rank,)) for rank in range(count)]
    for process in started:
        process.start()
    for process in started:
        process.join()
    return [process.exitcode for process in started]


if __name__ == "__main__":
    torch.set_num_threads(1)
    allow_fsdp_on_cpu()
    folder, strategies = Path(sys.argv[1]), [name for name in sys.argv[2:] if name != "--short"]
    names = SHORT if "--short" in sys.argv else tuple(CONFIGS)
    if any(strategy.startswith("zero") for strategy in strategies):
        allow_deepspeed_on_cpu()
    assert processes(2, killed, folder, strategies) == [-signal.SIGKILL] * 2
    assert processes(2, everything, folder, strategies, names) == [0, 0]
    assert processes(1, everything, folder, ["ddp"], names) == [0]
