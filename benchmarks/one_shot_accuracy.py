"""One-shot pruning of a fine-tuned encoder: accuracy without any training afterwards.

    python benchmarks/one_shot_accuracy.py --seed 0
    python benchmarks/one_shot_accuracy.py --table

MiniLM is fine-tuned on movie sentences; then all linear layers of its blocks are pruned, each time from the same dense
model, with `--calibration` sentences of the training set. Beside it LoRA of rank 8, unpruned, trained as long.
"""

from __future__ import annotations

import argparse
import copy
import sys
import tempfile
from pathlib import Path
from typing import Any


sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples"))

import torch
from offline_data import minilm_path
from peft import LoraConfig, get_peft_model
from scaffold import FOLDER, environment, make_parser, markdown, mean_and_each, metrics_in, read, settings, show_or_run
from tasks import load_task
from text_classification import evaluate, train
from torch.utils.data import DataLoader
from transformers import AutoTokenizer, DataCollatorWithPadding, set_seed

from peft_prune import SparseGPTConfig, WandaConfig, calibrate


RESULTS = FOLDER / "one_shot_accuracy.jsonl"
SPARSITIES = (0.5, 0.7, 0.8)
METHODS = {
    "wanda": lambda s, n: WandaConfig(task_type="SEQ_CLS", sparsity=s, num_samples=n, refine=None),
    "wanda, swaps": lambda s, n: WandaConfig(task_type="SEQ_CLS", sparsity=s, num_samples=n),
    "sparsegpt": lambda s, n: SparseGPTConfig(task_type="SEQ_CLS", sparsity=s, num_samples=n, solver="sparsegpt"),
    "admm": lambda s, n: SparseGPTConfig(task_type="SEQ_CLS", sparsity=s, num_samples=n, solver="admm"),
}


def by_magnitude(model: Any, sparsity: float) -> Any:
    """The one-line baseline."""
    with torch.no_grad():
        for name, module in model.named_modules():
            if isinstance(module, torch.nn.Linear) and ".layer." in name:
                size = module.weight.abs()
                module.weight.mul_(size > size.flatten().kthvalue(round(sparsity * size.numel())).values)
    return model


def run(args: argparse.Namespace) -> dict:
    set_seed(args.seed)
    tokenizer = AutoTokenizer.from_pretrained(minilm_path())
    train_set, eval_set, dense, metrics = load_task("movies", tokenizer)
    lora = get_peft_model(copy.deepcopy(dense), LoraConfig(task_type="SEQ_CLS", r=8, lora_alpha=16))
    collate = DataCollatorWithPadding(tokenizer)
    columns = [name for name in train_set.column_names if name != "length"]
    loader = DataLoader(train_set.shuffle(seed=args.seed).select_columns(columns), 32, collate_fn=collate)
    scores: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as folder:
        shared = {"steps": args.steps, "output_dir": folder, "use_cpu": True, "quiet": True, "seed": args.seed}
        for name, model, lr in (("dense", dense, args.lr), ("lora", lora, 10 * args.lr)):
            set_seed(args.seed)
            trainer = train(model, tokenizer, train_set, eval_set, lr=lr, compute_metrics=metrics, **shared)
            scores[name] = metrics_in(trainer.evaluate())["accuracy"]
        for sparsity in SPARSITIES:
            for name in ("magnitude", *METHODS):
                model = copy.deepcopy(dense)
                if name == "magnitude":
                    model = by_magnitude(model, sparsity)
                else:
                    model = get_peft_model(model, METHODS[name](sparsity, args.calibration))
                    calibrate(model, loader)
                scores[f"{name} {sparsity:.0%}"] = evaluate(model, tokenizer, eval_set, metrics, folder)[
                    "eval_accuracy"
                ]
                print(name, sparsity, scores[f"{name} {sparsity:.0%}"], flush=True)
    return settings(args) | {"scores": scores} | environment()


def table(path: Path) -> str:
    rows = read(path)

    def cell(key: str) -> str:
        return mean_and_each(rows, key)

    lines = [[name, *(cell(f"{name} {sparsity:.0%}") for sparsity in SPARSITIES)] for name in ("magnitude", *METHODS)]
    head = ["method", *(f"{sparsity:.0%} removed" for sparsity in SPARSITIES)]
    return f"dense {cell('dense')}; LoRA, unpruned {cell('lora')}\n\n" + markdown(head, lines)


if __name__ == "__main__":
    parser = make_parser(__doc__, RESULTS, table=True)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--lr", type=float, default=1e-4)
    parser.add_argument("--calibration", type=int, default=128, help="sentences")
    show_or_run(parser.parse_args(), table, run)
