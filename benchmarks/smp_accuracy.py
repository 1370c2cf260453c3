"""Accuracy of SMP on 1,000 held-out movie sentences, beside dense fine-tuning and a frozen encoder.

One process runs one configuration and appends a JSON line with its learning curve; `--table` turns the lines into a
table. Everything that the README says of accuracy comes from here:

    python benchmarks/smp_accuracy.py --run dense --seed 0
    python benchmarks/smp_accuracy.py --run smp-s --sparsity 0.9 --seed 0 --steps 678 --teacher
    python benchmarks/smp_accuracy.py --table
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from pathlib import Path


os.environ.setdefault("HF_HUB_OFFLINE", "1")
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples"))

from offline_data import minilm_path, movie_sentences
from peft import get_peft_model
from scaffold import FOLDER, environment, make_parser, markdown, mean_and_each, read, settings, show_or_run
from text_classification import load_classifier, tokenize, train, train_pruned
from transformers import AutoTokenizer, set_seed

from peft_prune import SMPConfig


RESULTS = FOLDER / "smp_accuracy.jsonl"


def parse() -> argparse.Namespace:
    parser = make_parser(__doc__, RESULTS, table=True)
    parser.add_argument("--run", choices=["dense", "frozen", "smp-l", "smp-s", "smp-g"])
    parser.add_argument("--sparsity", type=float, default=0.5)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=565)
    parser.add_argument("--lr", type=float, help="of all but the scores; 1e-4 dense, 1e-3 otherwise")
    parser.add_argument("--score-lr", type=float, default=2e-2)
    parser.add_argument("--penalty", type=float, default=400.0)
    parser.add_argument("--score-init", default="magnitude")
    parser.add_argument("--schedule-end", type=float, default=0.6)
    parser.add_argument("--teacher", action="store_true", help="distil from a dense model of the same seed")
    parser.add_argument("--teacher-steps", type=int, default=565)
    parser.add_argument("--alpha", type=float, default=0.5)
    parser.add_argument("--eval-every", type=int, default=113)
    parser.add_argument("--cache", type=Path, default=Path(tempfile.gettempdir()) / "peft_prune_teachers")
    return parser.parse_args()


def fine_tuned(args: argparse.Namespace, tokenizer, train_set, eval_set, steps: int):
    """A dense fine-tuned model, kept on disk so that runs share their teacher, and its curve."""
    folder = args.cache / f"dense-{args.seed}-{steps}"
    if (folder / "curve.json").exists():
        return load_classifier(str(folder)), json.loads((folder / "curve.json").read_text())
    model = load_classifier(minilm_path())
    lr = args.lr if args.run == "dense" and args.lr else 1e-4
    trainer = run_training(train, args, model, tokenizer, train_set, eval_set, lr=lr, steps=steps)
    model.save_pretrained(folder)
    curve = accuracy_curve(trainer)
    (folder / "curve.json").write_text(json.dumps(curve))
    return model, curve


def run_training(function, args, model, tokenizer, train_set, eval_set, **kwargs):
    with tempfile.TemporaryDirectory() as folder:
        return function(
            model, tokenizer, train_set, eval_set, output_dir=folder, seed=args.seed, use_cpu=True, quiet=True,
            eval_every=args.eval_every, **kwargs,
        )  # fmt: skip


def accuracy_curve(trainer) -> list[tuple[int, float]]:
    return [(entry["step"], entry["eval_accuracy"]) for entry in trainer.state.log_history if "eval_accuracy" in entry]


def run(args: argparse.Namespace) -> dict:
    set_seed(args.seed)
    tokenizer = AutoTokenizer.from_pretrained(minilm_path())
    train_set, eval_set = (tokenize(part, tokenizer) for part in movie_sentences())
    start = time.process_time()
    if args.run == "dense":
        _, curve = fine_tuned(args, tokenizer, train_set, eval_set, args.steps)
    else:
        teacher = fine_tuned(args, tokenizer, train_set, eval_set, args.teacher_steps)[0] if args.teacher else None
        set_seed(args.seed)
        start = time.process_time()
        model = load_classifier(minilm_path())
        lr = args.lr or 1e-3
        if args.run == "frozen":
            model.bert.encoder.requires_grad_(False)
            model.bert.embeddings.requires_grad_(False)
            trainer = run_training(train, args, model, tokenizer, train_set, eval_set, lr=lr, steps=args.steps)
        else:
            config = SMPConfig(
                task_type="SEQ_CLS", sparsity=args.sparsity, modules_to_save=["pooler"], penalty=args.penalty,
                allocation={"smp-l": "local", "smp-s": "score", "smp-g": "global"}[args.run],
                score_init=args.score_init, schedule_end=args.schedule_end,
            )  # fmt: skip
            model = get_peft_model(model, config)
            trainer = run_training(
                train_pruned, args, model, tokenizer, train_set, eval_set, lr=lr, steps=args.steps,
                teacher=teacher, score_lr=args.score_lr, distillation_alpha=args.alpha,
            )  # fmt: skip
            model.save_pretrained(args.cache / f"{args.run}-{args.sparsity}-{args.seed}")
        curve = accuracy_curve(trainer)
    majority = 100 * max(sum(eval_set["labels"]), len(eval_set) - sum(eval_set["labels"])) / len(eval_set)
    return settings(args, "cache", "eval_every") | {
        "accuracy": curve[-1][1], "curve": curve, "majority": majority, "cpu_seconds": time.process_time() - start,
        **environment(),
    }  # fmt: skip


def table(path: Path) -> str:
    """Mean and range over seeds of each configuration, as Markdown."""
    groups: dict[tuple, list[dict]] = {}
    for row in read(path):
        pruned = row["run"].startswith("smp")
        key = (row["run"], row["sparsity"] if pruned else 0.0, row["steps"], bool(pruned and row["teacher"]))
        groups.setdefault(key, []).append(row)
    lines = []
    for (name, sparsity, steps, distilled), rows in sorted(groups.items()):
        cells = [name, f"{sparsity:.0%}", str(steps), "yes" if distilled else "no", mean_and_each(rows, "accuracy")]
        lines.append(cells)
    return markdown(["run", "sparsity", "steps", "distilled", "accuracy, mean (each seed)"], lines)


if __name__ == "__main__":
    show_or_run(parse(), table, run)
