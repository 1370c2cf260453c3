"""What each process of tests/test_distributed.py runs: a short training that records the masks after every step."""

import sys
from pathlib import Path

import torch
from conftest import make_bert
from peft import get_peft_model
from test_movement import sparse_base
from test_training import Record, arguments, data

from peft_prune import DSEEConfig, MovementPruningConfig, PruningCallback, PruningTrainer, SMPConfig


SPARSE = {"task_type": "SEQ_CLS", "sparsity": 0.8}
CONFIGS = {
    "local": lambda: SMPConfig(**SPARSE, allocation="local"),
    "score": lambda: SMPConfig(**SPARSE, allocation="score"),
    "global": lambda: SMPConfig(**SPARSE, allocation="global"),
    "hard": lambda: MovementPruningConfig(**SPARSE, granularity="4x4"),
    "l0": lambda: MovementPruningConfig(variant="l0", task_type="SEQ_CLS"),
    "dsee": lambda: DSEEConfig(r=4, num_sparse=8, sparsity=0.5, task_type="SEQ_CLS"),
    "zeros": lambda: MovementPruningConfig(from_existing_zeros=True, task_type="SEQ_CLS"),
}


def main(folder: str, name: str, batch_size: int) -> None:
    torch.manual_seed(0)
    model = get_peft_model(sparse_base() if name == "zeros" else make_bert(), CONFIGS[name]())
    record = Record()
    args = arguments(folder, max_steps=6, per_device_train_batch_size=batch_size, max_grad_norm=0.0)
    trainer = PruningTrainer(model=model, args=args, train_dataset=data(32), callbacks=[PruningCallback(), record])
    trainer.train()
    rank, world = trainer.args.process_index, trainer.args.world_size
    masks = [torch.cat([mask.reshape(-1) for mask in step.values()]) for _, step in record.steps]
    torch.save({"world": world, "masks": masks}, Path(folder) / f"{name}-{rank}-of-{world}.pt")
    trainer.save_model(str(Path(folder) / f"{name}-adapter-of-{world}"))


if __name__ == "__main__":
    for each in CONFIGS:
        main(sys.argv[1], each, int(sys.argv[2]))
