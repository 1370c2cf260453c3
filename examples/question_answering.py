"""Question answering: SMP on SQuAD, distilled from a model that knows the task.

    python examples/question_answering.py --steps 5000

Model, teacher and data are asked of the Hub; all three may be folders.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset, load_dataset
from peft import get_peft_model
from transformers import AutoModelForQuestionAnswering, AutoTokenizer, TrainingArguments, default_data_collator

from peft_prune import PruningTrainer, SMPConfig


def features(rows: Dataset, tokenizer: Any, length: int) -> Dataset:
    """Questions with their contexts as tokens, and the tokens where the answer starts and ends."""

    def encode(row: dict[str, Any]) -> dict[str, Any]:
        encoded = tokenizer(
            row["question"], row["context"], truncation="only_second", max_length=length, padding="max_length",
            return_offsets_mapping=True,
        )  # fmt: skip
        start = row["answers"]["answer_start"][0]
        end = start + len(row["answers"]["text"][0])
        offsets, part = encoded.pop("offset_mapping"), encoded.sequence_ids()
        inside = [i for i, (a, b) in enumerate(offsets) if part[i] == 1 and a < end and b > start]
        # an answer that was cut off is pointed at by the first token
        positions = (inside[0], inside[-1]) if inside else (0, 0)
        return {**encoded, "start_positions": positions[0], "end_positions": positions[1]}

    return rows.map(encode, remove_columns=rows.column_names)


def exact(predictions: Any) -> dict[str, float]:
    """Share of answers whose two ends are right, in percent."""
    found = [np.argmax(logits, axis=-1) for logits in predictions.predictions[:2]]
    right = [ours == theirs for ours, theirs in zip(found, predictions.label_ids, strict=True)]
    return {"exact": 100 * float((right[0] & right[1]).mean())}


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="google-bert/bert-base-uncased")
    parser.add_argument("--teacher", default="csarron/bert-base-uncased-squad-v1", help="'' for none")
    parser.add_argument("--dataset", default="rajpurkar/squad")
    parser.add_argument("--sparsity", type=float, default=0.8)
    parser.add_argument("--steps", type=int, default=5000)
    parser.add_argument("--length", type=int, default=384, help="tokens of question and context together")
    parser.add_argument("--max-rows", type=int, help="use only so many rows of each split")
    parser.add_argument("--output", type=Path, default=Path("runs/squad"))
    args = parser.parse_args(argv)

    tokenizer = AutoTokenizer.from_pretrained(args.model)
    splits = [load_dataset(args.dataset, split=split) for split in ("train", "validation")]
    train_set, eval_set = (
        features(rows.select(range(min(args.max_rows or len(rows), len(rows)))), tokenizer, args.length)
        for rows in splits
    )
    model = get_peft_model(
        AutoModelForQuestionAnswering.from_pretrained(args.model),
        SMPConfig(task_type="QUESTION_ANS", sparsity=args.sparsity, allocation="score"),
    )
    trainer = PruningTrainer(
        model=model,
        args=TrainingArguments(
            str(args.output), max_steps=args.steps, per_device_train_batch_size=16, learning_rate=1e-3,
            save_strategy="no", report_to="none", label_names=["start_positions", "end_positions"],
        ),
        train_dataset=train_set,
        eval_dataset=eval_set,
        data_collator=default_data_collator,
        compute_metrics=exact,
        teacher=AutoModelForQuestionAnswering.from_pretrained(args.teacher) if args.teacher else None,
    )  # fmt: skip
    trainer.train()
    print(f"both ends of the answer right: {trainer.evaluate()['eval_exact']:.1f} %")
    model.save_pretrained(args.output)


if __name__ == "__main__":
    main()
