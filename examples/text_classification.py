"""What the quick start and the benchmarks share: data sets, training runs and accuracy of a text classifier."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Optional

import numpy as np
import torch
from datasets import Dataset
from transformers import (
    AutoModelForSequenceClassification,
    DataCollatorWithPadding,
    PreTrainedTokenizerBase,
    Trainer,
    TrainingArguments,
)

from peft_prune import PruningTrainer


def tokenize(examples: Sequence[tuple[str, int]], tokenizer: PreTrainedTokenizerBase, max_length: int = 128) -> Dataset:
    """(sentence, label) pairs as a `Dataset` of `input_ids`, `attention_mask`, `labels` and `length`."""
    encoded = tokenizer([text for text, _ in examples], truncation=True, max_length=max_length)
    columns = {key: encoded[key] for key in ("input_ids", "attention_mask")}
    columns["labels"] = [label for _, label in examples]
    columns["length"] = [len(ids) for ids in encoded["input_ids"]]
    return Dataset.from_dict(columns)


def load_classifier(path: str, num_labels: int = 2) -> torch.nn.Module:
    """A classifier with a new head on a pre-trained encoder, in float32."""
    return AutoModelForSequenceClassification.from_pretrained(path, num_labels=num_labels, dtype=torch.float32)


def accuracy(predictions: Any) -> dict[str, float]:
    """Accuracy in percent, as `Trainer` wants it."""
    logits = predictions.predictions[0] if isinstance(predictions.predictions, tuple) else predictions.predictions
    return {"accuracy": 100.0 * float((np.argmax(logits, axis=-1) == predictions.label_ids).mean())}


def train(
    model: torch.nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    train_set: Dataset,
    eval_set: Dataset,
    *,
    lr: float,
    steps: int,
    output_dir: str,
    batch_size: int = 32,
    seed: int = 0,
    eval_every: Optional[int] = None,
    use_cpu: bool = False,
    quiet: bool = False,
    bf16: bool = False,
    compute_metrics: Any = accuracy,
    trainer_cls: type[Trainer] = Trainer,
    **trainer_kwargs: Any,
) -> Trainer:
    """Train a classifier and return its trainer. `trainer_kwargs` go to the trainer, for instance `teacher`."""
    args = TrainingArguments(
        output_dir=output_dir,
        per_device_train_batch_size=batch_size,
        per_device_eval_batch_size=64,
        max_steps=steps,
        learning_rate=lr,
        warmup_steps=0.06,
        lr_scheduler_type="linear",
        train_sampling_strategy="group_by_length",
        eval_strategy="steps" if eval_every else "no",
        eval_steps=eval_every,
        logging_steps=eval_every or 20,
        save_strategy="no",
        report_to="none",
        seed=seed,
        use_cpu=use_cpu,
        bf16=bf16,
        disable_tqdm=quiet,
        dataloader_pin_memory=False,
    )
    trainer = trainer_cls(
        model=model,
        args=args,
        train_dataset=train_set,
        eval_dataset=eval_set,
        processing_class=tokenizer,
        data_collator=DataCollatorWithPadding(tokenizer),
        compute_metrics=compute_metrics,
        **trainer_kwargs,
    )
    trainer.train()
    return trainer


def evaluate(
    model: torch.nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    eval_set: Dataset,
    compute_metrics: Any = accuracy,
    output_dir: str = "eval",
) -> dict[str, float]:
    """Metrics of a classifier as it is."""
    args = TrainingArguments(output_dir=output_dir, per_device_eval_batch_size=64, report_to="none", use_cpu=True)
    collator = DataCollatorWithPadding(tokenizer)
    trainer = Trainer(model=model, args=args, data_collator=collator, compute_metrics=compute_metrics)
    return trainer.evaluate(eval_set)  # type: ignore[arg-type]


def train_pruned(*args: Any, **kwargs: Any) -> PruningTrainer:
    """[`train`] with a [`PruningTrainer`]."""
    return train(*args, trainer_cls=PruningTrainer, **kwargs)  # type: ignore[return-value]
