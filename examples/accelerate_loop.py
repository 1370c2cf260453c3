"""A plain Accelerate loop that trains masks, in one process or several: no Trainer, no callback.

The model and the sentences come inside PyPI packages (see `offline_data.py`). In one process, and in two on a CPU:

    python examples/accelerate_loop.py
    torchrun --nproc_per_node 2 examples/accelerate_loop.py --cpu

`--batch-size` is that of all processes together, so both train the same mask.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path


os.environ.setdefault("HF_HUB_OFFLINE", "1")  # has to be set before the imports below

import torch
from accelerate import Accelerator
from accelerate.utils import DataLoaderConfiguration, set_seed
from offline_data import minilm_path, movie_sentences
from peft import PeftModel, get_peft_model
from text_classification import load_classifier, tokenize
from torch.utils.data import DataLoader
from transformers import AutoTokenizer, DataCollatorWithPadding

from peft_prune import SMPConfig, create_pruning_optimizer, finalize, update_schedule


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sparsity", type=float, default=0.5)
    parser.add_argument("--allocation", choices=["local", "score", "global"], default="score")
    parser.add_argument("--steps", type=int, default=280, help="optimizer steps")
    parser.add_argument("--batch-size", type=int, default=32, help="sentences a step, of all processes together")
    parser.add_argument("--lr", type=float, default=2e-2, help="learning rate of the scores")
    parser.add_argument("--max-train", type=int, help="use only so many training sentences")
    parser.add_argument("--max-eval", type=int, help="use only so many held-out sentences")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--cpu", action="store_true")
    parser.add_argument("--output", type=Path, default=Path("runs/accelerate_loop"))
    return parser.parse_args(argv)


def loaders(args: argparse.Namespace, tokenizer: AutoTokenizer) -> tuple[DataLoader, DataLoader]:
    """Batches of training and held-out sentences; Accelerate deals each batch out to the processes."""
    train, held_out = movie_sentences()
    collate = DataCollatorWithPadding(tokenizer)
    sets = [
        tokenize(part, tokenizer).remove_columns("length")
        for part in (train[: args.max_train], held_out[: args.max_eval])
    ]
    return (
        DataLoader(sets[0], batch_size=args.batch_size, shuffle=True, collate_fn=collate, drop_last=True),
        DataLoader(sets[1], batch_size=args.batch_size, collate_fn=collate),
    )


def train(
    accelerator: Accelerator, model: torch.nn.Module, loader: DataLoader, args: argparse.Namespace
) -> torch.nn.Module:
    """Train masks and classifier; returns the model with final masks, as Accelerate has wrapped it."""
    optimizer = create_pruning_optimizer(model, lr=5e-4, score_lr=args.lr)
    model, optimizer = accelerator.prepare(model, optimizer)
    model.train()
    update_schedule(model, 0, total_steps=args.steps)
    step = 0
    while step < args.steps:
        for batch in loader:
            loss = model(**batch).loss
            accelerator.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
            step += 1
            report = update_schedule(model, step)  # after each optimizer step, in every process
            if step % 20 == 0 or step == args.steps:
                accelerator.print(f"step {step}: loss {loss.item():.3f}, sparsity {report['sparsity']:.3f}")
            if step == args.steps:
                break
    finalize(model)  # in every process too
    return model


@torch.no_grad()
def accuracy(accelerator: Accelerator, model: torch.nn.Module, loader: DataLoader) -> float:
    """Accuracy in percent; every process judges its share of each batch."""
    model.eval()
    right, seen = 0, 0
    for batch in loader:
        predicted = model(**batch).logits.argmax(-1)
        predicted, labels = accelerator.gather_for_metrics((predicted, batch["labels"]))
        right, seen = right + int((predicted == labels).sum()), seen + len(labels)
    return 100.0 * right / seen


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    accelerator = Accelerator(cpu=args.cpu, dataloader_config=DataLoaderConfiguration(split_batches=True))
    set_seed(args.seed)
    with accelerator.main_process_first():  # one process downloads
        path = minilm_path()
        tokenizer = AutoTokenizer.from_pretrained(path)
        train_loader, eval_loader = loaders(args, tokenizer)
    config = SMPConfig(task_type="SEQ_CLS", sparsity=args.sparsity, allocation=args.allocation)
    model = get_peft_model(load_classifier(path), config)
    accelerator.print(f"{accelerator.num_processes} process(es) on {accelerator.device.type}")
    train_loader, eval_loader = accelerator.prepare(train_loader, eval_loader)
    model = train(accelerator, model, train_loader, args)
    accelerator.print(f"accuracy: {accuracy(accelerator, model, eval_loader):.2f} %")

    state = accelerator.get_state_dict(model)  # in every process: with FSDP each has a part
    if accelerator.is_main_process:
        accelerator.unwrap_model(model).save_pretrained(args.output, state_dict=state)
    accelerator.wait_for_everyone()
    loaded = PeftModel.from_pretrained(load_classifier(path), args.output).to(accelerator.device)
    accelerator.print(f"accuracy, loaded from {args.output}: {accuracy(accelerator, loaded, eval_loader):.2f} %")
    accelerator.end_training()


if __name__ == "__main__":
    main()
