"""A smaller language model that still works: prune, repair, recover with the dense model as teacher, merge, save.

    python examples/prune_llm.py
    python examples/prune_llm.py --keep 0.6 --steps 200
    python examples/prune_llm.py --dense --output runs/dense   # the yardstick: the dense model with the same LoRA

By default SmolLM2-135M on WikiText-2, both inside PyPI packages; `--model` takes any causal LM, `--text` a file, the
last tenth of which is held out. Prints perplexity before, between and after, on text that was trained on and on others.
If it is stopped, the same command continues where it was.
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from offline_data import movie_sentences, penn_treebank, smollm2_path, sts_b, wikitext_2
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainingArguments, set_seed
from transformers.trainer_utils import get_last_checkpoint

from peft_prune import DistillationTrainer, StructuredPruningConfig, calibrate, load_compact, model_size, save_compact


def windows(tokenizer: Any, text: str, length: int, most: int) -> torch.Tensor:
    """The first windows of a text: int64, shape (windows, length)."""
    tokens = tokenizer(text, return_tensors="pt")["input_ids"][0]
    count = min(most, len(tokens) // length)
    return tokens[: count * length].view(count, length)


@torch.no_grad()
def perplexity(model: Any, rows: torch.Tensor) -> float:
    """Of windows, each by itself: int64, shape (windows, tokens)."""
    model.eval()
    losses = [model(input_ids=row[None], labels=row[None]).loss.item() for row in rows.to(model.device)]
    return math.exp(sum(losses) / len(losses))


def prune(model: Any, calibration: torch.Tensor, **fields: Any) -> Any:
    """A smaller model: heads and neurons are removed, and the weights that are kept are repaired."""
    config = StructuredPruningConfig(task_type="CAUSAL_LM", num_samples=len(calibration), **fields)
    model = get_peft_model(model, config)
    print("shares that are kept:", calibrate(model, [{"input_ids": row[None]} for row in calibration]))
    return model.merge_and_unload()


def recover(
    model: Any, rows: torch.Tensor, folder: Path, teacher: Any = None, alpha: float = 0.5, steps: int = 60,
    batch_size: int = 4, rank: int = 8, lr: float = 1e-3, seed: int = 0, bf16: bool = False,
) -> Any:  # fmt: skip
    """Train a LoRA on all linear layers and merge it; continues from the last checkpoint in `folder`.

    Args:
        model (`PreTrainedModel`): what is trained.
        rows (`torch.Tensor`): windows of text, int64, shape (windows, tokens).
        folder (`Path`): where checkpoints are written.
        teacher (`PreTrainedModel`, *optional*): the dense model, whose logits are learned beside the text.
        alpha (`float`): weight of the teacher; that of the text is the rest.
        bf16 (`bool`): multiply matrices in bfloat16, on hardware that is faster at it.
    """
    last = get_last_checkpoint(str(folder)) if folder.exists() else None
    if last and last.endswith(f"-{steps}"):  # nothing is left to train
        return PeftModel.from_pretrained(model, last).merge_and_unload()
    set_seed(seed)
    lora = LoraConfig(task_type="CAUSAL_LM", r=rank, lora_alpha=2 * rank, target_modules="all-linear")
    arguments = TrainingArguments(
        str(folder), max_steps=steps, per_device_train_batch_size=batch_size, learning_rate=lr, weight_decay=0.0,
        warmup_steps=steps // 10, save_steps=max(1, steps // 6), save_total_limit=1, report_to="none",
        logging_steps=max(1, steps // 12), seed=seed, bf16=bf16, use_cpu=bf16 and not torch.cuda.is_available(),
    )  # fmt: skip
    trainer = DistillationTrainer(
        model=get_peft_model(model, lora),
        args=arguments,
        train_dataset=Dataset.from_dict({"input_ids": rows.tolist(), "labels": rows.tolist()}),
        teacher=teacher,
        distillation_alpha=alpha,
        distillation_temperature=1.0,
    )
    trainer.train(resume_from_checkpoint=last)
    return trainer.model.merge_and_unload()


class Figures:
    """Perplexities that were measured, kept in a file, so that what is done is not done again."""

    def __init__(self, args: argparse.Namespace, held_out: dict[str, torch.Tensor]) -> None:
        self.path, self.held_out = args.output / "figures.json", held_out
        settings = {name: str(value) for name, value in sorted(vars(args).items())}
        self.all = json.loads(self.path.read_text()) if self.path.exists() else {"settings": settings}
        if self.all["settings"] != settings:
            raise SystemExit(f"{args.output} holds a run with other settings, {self.all['settings']}. Use --output.")

    def measure(self, name: str, model: Any) -> None:
        if name not in self.all:
            self.all[name] = {text: perplexity(model, rows) for text, rows in self.held_out.items()}
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.path.write_text(json.dumps(self.all, indent=2))
        texts = ", ".join(f"{text} {value:.1f}" for text, value in self.all[name].items())
        print(f"{name}: {model_size(model).parameters:,} parameters; perplexity: {texts}")


def texts_of(args: argparse.Namespace) -> tuple[str, dict[str, str]]:
    """Text to calibrate and train on, and texts to judge by."""
    if args.text:
        text = args.text.read_text()
        return text[: len(text) * 9 // 10], {"held-out text": text[len(text) * 9 // 10 :]}
    others = {
        "Penn Treebank": penn_treebank("test"),
        "film sentences": "\n".join(sentence for sentence, _ in movie_sentences()[1]),
        "STS-B": "\n".join(f"{first} {second}" for first, second, _ in sts_b("test")),
    }
    return wikitext_2("train")[:2_000_000], {"WikiText-2": wikitext_2("test")[:200_000]} | others


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="folder or Hub id of a causal LM")
    parser.add_argument("--text", type=Path, help="file to calibrate and train on; the last tenth is held out")
    parser.add_argument("--keep", type=float, default=0.8, help="share of the FLOPs of the blocks that stays")
    parser.add_argument("--dense", action="store_true", help="prune nothing: the yardstick")
    parser.add_argument("--steps", type=int, default=60, help="of the LoRA")
    parser.add_argument("--alpha", type=float, default=0.5, help="weight of the dense teacher; 0: none")
    parser.add_argument("--samples", type=int, default=32, help="windows to calibrate on")
    parser.add_argument("--length", type=int, default=512, help="tokens of a window; half as many when training")
    parser.add_argument("--windows", type=int, default=16, help="windows of each text that perplexity is measured on")
    parser.add_argument("--output", type=Path, default=Path("runs/prune_llm"))
    args = parser.parse_args(argv)

    set_seed(0)
    path = args.model or smollm2_path()
    tokenizer = AutoTokenizer.from_pretrained(path)
    text, others = texts_of(args)
    figures = Figures(args, {n: windows(tokenizer, t, args.length, args.windows) for n, t in others.items()})
    train_rows = windows(tokenizer, text, args.length // 2, 1 << 30)

    def dense() -> Any:
        return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)

    model, pruned = dense(), args.output / "pruned"
    figures.measure("dense", model)
    if not args.dense:
        if not pruned.exists():
            calibration = windows(tokenizer, text, args.length, args.samples)
            save_compact(prune(model, calibration, keep_ratio=args.keep), args.output / "partial")
            (args.output / "partial").rename(pruned)  # so that what is there is complete
        model = load_compact(pruned)
        figures.measure("pruned", model)
    teacher = dense() if args.alpha and not args.dense else None
    model = recover(model, train_rows, args.output / "training", teacher, args.alpha, args.steps)
    figures.measure("dense + LoRA" if args.dense else "recovered", model)
    model.save_pretrained(args.output / "recovered")
    tokenizer.save_pretrained(args.output / "recovered")
    print(f"saved: {args.output / 'recovered'}" + ("" if args.dense else ", for peft_prune.load_compact"))


if __name__ == "__main__":
    main()
