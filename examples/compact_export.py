"""From a dense model to a smaller one in onnxruntime: P-pruning, a short fine-tuning, export.

    python examples/compact_export.py --keep 0.6 --steps 170

Heads and neurons go before training, so that training is cheaper, too. Model and data come inside PyPI packages.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Any


os.environ.setdefault("HF_HUB_OFFLINE", "1")

import numpy as np
import torch
from offline_data import minilm_path, movie_sentences
from peft import get_peft_model
from text_classification import load_classifier, tokenize, train
from transformers import AutoTokenizer, DataCollatorWithPadding, set_seed

from peft_prune import PPruningConfig, calibrate, load_compact, model_size, save_compact
from peft_prune.report import export_onnx


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--keep", type=float, default=0.6, help="share of the encoder's FLOPs")
    parser.add_argument("--steps", type=int, default=170)
    parser.add_argument("--max-train", type=int)
    parser.add_argument("--max-eval", type=int)
    parser.add_argument("--output", type=Path, default=Path("runs/compact"))
    args = parser.parse_args(argv)

    set_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(minilm_path())
    train_rows, eval_rows = movie_sentences()
    train_set = tokenize(train_rows[: args.max_train], tokenizer)
    eval_set = tokenize(eval_rows[: args.max_eval], tokenizer)
    collate = DataCollatorWithPadding(tokenizer)
    kept = ("input_ids", "attention_mask")
    samples = [collate([{k: row[k] for k in kept} for row in train_set.select(range(i, i + 16))]) for i in (0, 16)]

    model: Any = get_peft_model(
        load_classifier(minilm_path()), PPruningConfig(task_type="SEQ_CLS", keep_ratio=args.keep)
    )
    before = model_size(model)
    calibrate(model, samples)
    small = model.merge_and_unload()
    after = model_size(small)
    print(f"parameters: {before.parameters:,} -> {after.parameters:,}")
    trainer = train(
        small, tokenizer, train_set, eval_set, lr=1e-4, steps=args.steps, output_dir=str(args.output), use_cpu=True,
        quiet=True,
    )  # fmt: skip
    print(f"accuracy: {trainer.evaluate()['eval_accuracy']:.1f} %")
    save_compact(small, args.output)
    tokenizer.save_pretrained(args.output)

    loaded = load_compact(args.output).eval()
    path = Path(export_onnx(loaded, args.output / "model.onnx"))
    import onnxruntime

    session = onnxruntime.InferenceSession(str(path))
    batch = tokenizer([eval_rows[0][0]], return_tensors="pt")
    inputs = {value.name: batch[value.name].numpy() for value in session.get_inputs()}
    with torch.no_grad():
        np.testing.assert_allclose(session.run(["logits"], inputs)[0], loaded(**batch).logits.numpy(), atol=1e-3)
    print(f"onnxruntime answers as PyTorch does: {path} ({path.stat().st_size:,} bytes)")


if __name__ == "__main__":
    main()
