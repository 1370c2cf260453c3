"""DSEE on MiniLM beside LoRA: score, trainable numbers, FLOPs and bytes, on movie sentences and STS-B.

Every row has rank 16 on queries and values; DSEE has 64 places of each matrix besides, and prunes half way:

    python benchmarks/dsee_accuracy.py --task movies --seed 0       # all settings that the results lack
    python benchmarks/dsee_accuracy.py --table
    python benchmarks/dsee_accuracy.py --bert-base                  # trainable share for that shape, random weights
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any


os.environ.setdefault("HF_HUB_OFFLINE", "1")
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples"))

import torch
from offline_data import minilm_path
from peft import LoraConfig, PeftModel, get_peft_model
from scaffold import FOLDER, append, environment, make_parser, markdown, mean, mean_and_each, metrics_in, read, settings
from tasks import load_task
from text_classification import train, train_pruned
from transformers import AutoTokenizer, BertConfig, BertForSequenceClassification, set_seed

from peft_prune import DSEEConfig, model_size


RESULTS = FOLDER / "dsee_accuracy.jsonl"
SETTINGS: dict[str, dict[str, Any]] = {
    "LoRA": {},
    "DSEE, 0 %": {"sparsity": 0.0},
    "DSEE, 20 %": {"sparsity": 0.2},
    "DSEE, 50 %": {"sparsity": 0.5},
    "DSEE, 3 of 12 heads": {"heads_to_prune": 3},
    "DSEE, 3 of 12 heads, 40 % of neurons": {"heads_to_prune": 3, "neuron_sparsity": 0.4},
}
LENGTH = 128  # tokens for which FLOPs are counted


def parse() -> argparse.Namespace:
    parser = make_parser(__doc__, RESULTS, table=True)
    parser.add_argument("--task", choices=["movies", "stsb"], default="movies")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=200, help="the table has 200 on movies and 240 on STS-B")
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--settings", nargs="*", choices=list(SETTINGS), default=list(SETTINGS))
    parser.add_argument("--bert-base", action="store_true")
    return parser.parse_args()


def adapter(setting: str, seed: int, **fields: Any) -> Any:
    common: dict[str, Any] = {"task_type": "SEQ_CLS", "r": 16, "lora_alpha": 16} | fields
    if setting == "LoRA":
        return LoraConfig(target_modules=["query", "value"], **common)
    return DSEEConfig(preset="paper", num_sparse=64, seed=seed, **common, **SETTINGS[setting])


def trained(model: torch.nn.Module) -> dict[str, int]:
    """Trained numbers of the adapter, of the head that is trained beside it, and all numbers of the base."""
    trainable = {name: p.numel() for name, p in model.named_parameters() if p.requires_grad}
    head = sum(n for name, n in trainable.items() if "modules_to_save" in name)
    every = {id(p): p.numel() for name, p in model.get_base_model().named_parameters() if p.requires_grad is False}
    return {"adapter": sum(trainable.values()) - head, "head": head, "base": sum(every.values())}


def run(args: argparse.Namespace, setting: str) -> dict[str, Any]:
    set_seed(args.seed)
    start = time.process_time()
    tokenizer = AutoTokenizer.from_pretrained(minilm_path())
    train_set, eval_set, base, metrics = load_task(args.task, tokenizer)
    dense = model_size(base, LENGTH)
    model = get_peft_model(base, adapter(setting, args.seed, modules_to_save=["pooler", "classifier"]))
    numbers = trained(model)
    fit = train if setting == "LoRA" else train_pruned
    with tempfile.TemporaryDirectory() as folder:
        trainer = fit(
            model, tokenizer, train_set, eval_set, lr=args.lr, steps=args.steps, output_dir=folder, seed=args.seed,
            use_cpu=True, quiet=True, compute_metrics=metrics, batch_size=args.batch_size,
        )  # fmt: skip
        scores = metrics_in(trainer.evaluate())
        model.save_pretrained(folder)
        stored = (Path(folder) / "adapter_model.safetensors").stat().st_size
        merged = PeftModel.from_pretrained(load_task(args.task, tokenizer)[2], folder).merge_and_unload()
    small = model_size(merged, LENGTH)
    return settings(args, "bert_base", "settings") | {
        "setting": setting, "scores": scores, "numbers": numbers, "bytes": stored,
        "macs_saved": 1 - small.macs / dense.macs, "parameters": small.parameters,
        "dense_parameters": dense.parameters, "cpu_seconds": time.process_time() - start,
        **environment(),
    }  # fmt: skip


def table(path: Path) -> str:
    """A row for each setting: mean and each seed's scores, and the sizes."""
    rows, lines = read(path), []
    for setting in SETTINGS:
        found = [row for row in rows if row["setting"] == setting]
        if not found:
            continue
        cells = [
            mean_and_each([row for row in found if row["task"] == task], metric)
            for task, metric in (("movies", "accuracy"), ("stsb", "pearson"), ("stsb", "spearman"))
        ]
        numbers = found[0]["numbers"]
        share = numbers["adapter"] / found[0]["dense_parameters"]
        saved, stored = mean([row["macs_saved"] for row in found]), mean([row["bytes"] for row in found])
        cells += [f"{numbers['adapter']:,} ({share:.2%})", f"{saved:.0%}", f"{stored / 1e6:.2f} MB"]
        lines.append([setting, *cells])
    head = ["", "movies, accuracy", "STS-B, Pearson", "STS-B, Spearman", "trained", "FLOPs saved", "adapter"]
    return markdown(head, lines)


def bert_base() -> str:
    """Trained numbers beside those of BERT-base."""
    model = BertForSequenceClassification(BertConfig())
    size = sum(p.numel() for p in model.parameters())
    ours = trained(get_peft_model(model, adapter("DSEE, 0 %", 0, support="random")))
    return f"{ours['adapter']:,} of {size:,} ({ours['adapter'] / size:.2%}), and a head of {ours['head']:,}"


if __name__ == "__main__":
    arguments = parse()
    if arguments.table:
        print(table(arguments.results))
    elif arguments.bert_base:
        print(bert_base())
    else:
        done = {(row["task"], row["setting"], row["seed"]) for row in read(arguments.results)}
        for name in arguments.settings:
            if (arguments.task, name, arguments.seed) not in done:
                append(arguments.results, run(arguments, name))
