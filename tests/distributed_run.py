"""What each process of tests/test_distributed.py runs: a short training that records the masks after every step."""

import sys
from pathlib import Path

import torch
from conftest import make_bert
from peft import get_peft_model
from test_training import Record, arguments, data

from peft_prune import PruningCallback, PruningTrainer, SMPConfig


def main(folder: str, allocation: str, batch_size: int) -> None:
    torch.manual_seed(0)
    config = SMPConfig(task_type="SEQ_CLS", sparsity=0.8, allocation=allocation)
    model = get_peft_model(make_bert(), config)
    record = Record()
    args = arguments(folder, max_steps=6, per_device_train_batch_size=batch_size, max_grad_norm=0.0)
    trainer = PruningTrainer(model=model, args=args, train_dataset=data(32), callbacks=[PruningCallback(), record])
    trainer.train()
    rank, world = trainer.args.process_index, trainer.args.world_size
    masks = [torch.cat([mask.reshape(-1) for mask in step.values()]) for _, step in record.steps]
    torch.save({"world": world, "masks": masks}, Path(folder) / f"{allocation}-{rank}-of-{world}.pt")
    trainer.save_model(str(Path(folder) / f"{allocation}-adapter-of-{world}"))


if __name__ == "__main__":
    for each in ("local", "score", "global"):
        main(sys.argv[1], each, int(sys.argv[2]))
