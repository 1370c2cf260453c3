"""Pruning methods in PEFT's `method_comparison`: any causal LM, records as PEFT writes them, and two columns more.

    python benchmarks/method_comparison.py --experiment smp/half --steps 20
    python benchmarks/method_comparison.py --experiment lora/rank8 --steps 20
    python benchmarks/method_comparison.py --experiment structured/keep80 --model meta-llama/Llama-3.2-3B \\
        --data metamath --device cuda --dtype bfloat16
    python benchmarks/method_comparison.py --table

`--experiment METHOD/NAME` is named as in PEFT; METHOD is one of `CONFIGS`, or anything with `--config FOLDER`, which
holds an `adapter_config.json`. Methods that are calibrated only are not trained. By default the model is SmolLM2-135M
and the task is to answer whether a film review is good or bad; `--data metamath` is PEFT's own task, from the Hub, and
`--data FOLDER` reads `train.jsonl`, `valid.jsonl` and `test.jsonl`, lines with `query` and `response`.

New in `train_info`: `sparsity`, the share of the base's weights (without embeddings and head) that are zero or removed
after `merge_and_unload()`; and `speed`, the time of a forward pass of the dense model over that of the merged one.
`forgetting` is the rise of the loss on WikiText-2, which PEFT measures on Wikipedia.
"""

from __future__ import annotations

import argparse
import datetime
import math
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import comparison_tasks as tasks
import torch
from comparison_record import Memory, meta_info, table, write_record
from peft import LoraConfig, PeftConfig, get_peft_model
from scaffold import FOLDER
from transformers import AutoModelForCausalLM, AutoTokenizer, get_cosine_schedule_with_warmup, set_seed

from peft_prune import (
    DSEEConfig,
    MovementPruningConfig,
    PPruningConfig,
    SMPConfig,
    SparseGPTConfig,
    StructuredPruningConfig,
    WandaConfig,
    calibrate,
    create_pruning_optimizer,
    finalize,
    update_schedule,
)
from peft_prune.recipe import Moment
from peft_prune.stages.schedule import trained_adapters


CONFIGS: dict[str, Any] = {
    "lora": lambda: LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM"),
    "smp": lambda: SMPConfig(sparsity=0.5, task_type="CAUSAL_LM"),
    "movement": lambda: MovementPruningConfig(sparsity=0.5, task_type="CAUSAL_LM", update="low_rank", r=8),
    "dsee": lambda: DSEEConfig(sparsity=0.5, task_type="CAUSAL_LM"),
    "wanda": lambda: WandaConfig(sparsity=0.5, task_type="CAUSAL_LM"),
    "sparsegpt": lambda: SparseGPTConfig(sparsity=0.5, task_type="CAUSAL_LM"),
    "ppruning": lambda: PPruningConfig(keep_ratio=0.8, task_type="CAUSAL_LM", repair=True),
    "structured": lambda: StructuredPruningConfig(keep_ratio=0.8, task_type="CAUSAL_LM"),
}


def inner_weights(model: Any) -> tuple[int, int]:
    """Weights but for embeddings and head, and how many of them are not zero."""
    outer = {id(m.weight) for m in (model.get_input_embeddings(), model.get_output_embeddings()) if m is not None}
    inner = [p for p in model.parameters() if id(p) not in outer]
    return sum(p.numel() for p in inner), int(sum(p.count_nonzero() for p in inner))


@torch.no_grad()
def forward_seconds(model: Any, batch: dict[str, torch.Tensor], rounds: int = 5) -> float:
    """Median time of a forward pass."""
    model.eval()
    seconds = []
    for _ in range(rounds + 1):  # the first warms up
        started = time.perf_counter()
        model(**batch).logits.sum().item()  # waits for an accelerator
        seconds.append(time.perf_counter() - started)
    return statistics.median(seconds[1:])


def calibrate_if_needed(model: Any, config: Any, data: tasks.Task, args: argparse.Namespace) -> None:
    """For methods whose mask, or whose scores' start, comes from activations."""
    recipe = getattr(config, "recipe", None)
    at_calibration = recipe is not None and recipe().moment is Moment.CALIBRATION
    if at_calibration or getattr(config, "score_init", None) in ("wanda", "sparsegpt"):
        config.num_samples = args.calibration
        batches = data.training_batches(math.ceil(args.calibration / args.batch_size))
        calibrate(model, [{k: v for k, v in batch.items() if k != "labels"} for batch in batches])


def train(model: Any, data: tasks.Task, args: argparse.Namespace, memory: Memory) -> dict[str, Any]:
    """A loop like PEFT's; a pruning method's schedule advances after each step."""
    masked = bool(trained_adapters(model))
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = create_pruning_optimizer(model, lr=args.lr) if masked else torch.optim.AdamW(trained, lr=args.lr)
    schedule = get_cosine_schedule_with_warmup(optimizer, args.steps // 10, args.steps)
    if masked:
        update_schedule(model, 0, args.steps)
    losses, tokens, seconds = [], [], []
    model.train()
    for step, batch in enumerate(data.training_batches(args.steps), 1):
        started = time.perf_counter()
        loss = model(**batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        if masked:
            update_schedule(model, step, args.steps)
        losses.append(loss.item())
        tokens.append(int(batch["attention_mask"].sum()))
        seconds.append(time.perf_counter() - started)
        memory.note()
    if masked:
        finalize(model)
    last = losses[-min(len(losses), 50) :]
    return {
        "loss": sum(last) / len(last), "tokens": sum(tokens), "seconds": sum(seconds), "steps": len(losses),
        "samples": len(losses) * args.batch_size,
    }  # fmt: skip


def adapter_bytes(model: Any) -> int:
    """Of the file of tensors that `save_pretrained` writes."""
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        return (Path(folder) / "adapter_model.safetensors").stat().st_size


def after_training(
    model: Any, data: tasks.Task, done: dict[str, Any], memory: Memory, started: float
) -> dict[str, Any]:
    """The entry of `metrics` that PEFT writes at each evaluation; here there is one, after the last step."""
    valid_started = time.perf_counter()
    return {
        "step": done["steps"], "valid accuracy": data.accuracy(model, "valid"), "train loss": done["loss"],
        "train samples": done["samples"], "train time": done["seconds"],
        "eval time": time.perf_counter() - valid_started, "tokens / sec": done["tokens"] / done["seconds"],
        "mem allocated avg": memory.allocated(),
        "mem reserved avg": memory.summary()["accelerator_memory_reserved_avg"],
        "elapsed time": time.perf_counter() - started,
    }  # fmt: skip


def run(args: argparse.Namespace) -> dict[str, Any]:
    """One experiment, from the dense model to the record."""
    started, created = time.perf_counter(), datetime.datetime.now(tz=datetime.timezone.utc).replace(microsecond=0)
    set_seed(args.seed)
    device = torch.device(args.device)
    path = args.model or tasks.default_model()
    tokenizer = AutoTokenizer.from_pretrained(path)
    base = AutoModelForCausalLM.from_pretrained(path, dtype=getattr(torch, args.dtype)).to(device)
    config = PeftConfig.from_pretrained(args.config) if args.config else CONFIGS[args.experiment.split("/")[0]]()
    config.base_model_name_or_path = str(args.model or "SmolLM2-135M")
    data = tasks.Task(tokenizer, args, device)
    probe, weights = data.probe(), inner_weights(base)[0]
    dense_seconds, general_before = forward_seconds(base, probe), data.general_loss(base)

    model, memory = get_peft_model(base, config), Memory(device)
    prepared = time.perf_counter()
    calibrate_if_needed(model, config, data, args)
    prepared = time.perf_counter() - prepared
    trainable, total = model.get_nb_trainable_parameters()
    done: dict[str, Any] = {"loss": None, "tokens": 0, "seconds": 0.0, "steps": 0, "samples": 0}
    if trainable:
        done = train(model, data, args, memory)
    size = adapter_bytes(model)
    metrics = [after_training(model, data, done, memory, started)] if done["steps"] else []
    merged = model.merge_and_unload()
    metrics.append({
        "step": done["steps"], "test accuracy": data.accuracy(merged, "test"), "train loss": done["loss"],
        "train samples": done["samples"], "train total tokens": done["tokens"],
        "forgetting": data.general_loss(merged) - general_before,
    })  # fmt: skip
    return {
        "run_info": {
            "created_at": created.isoformat(), "total_time": time.perf_counter() - started,
            "experiment_name": args.experiment, "peft_branch": "main", "train_config": train_config(args, path),
            "peft_config": config.to_dict(), "error_msg": "",
        },
        "train_info": memory.summary() | {
            "train_time": prepared + done["seconds"], "file_size": size, "num_trainable_params": trainable,
            "num_total_params": total, "status": "success", "metrics": metrics,
            "sparsity": 1 - inner_weights(merged)[1] / weights,
            "speed": dense_seconds / forward_seconds(merged, probe),
        },
        "meta_info": meta_info(data.names, device),
    }  # fmt: skip


def train_config(args: argparse.Namespace, path: str) -> dict[str, Any]:
    """PEFT's names for the settings of a run."""
    return {
        "model_id": args.model or Path(path).name, "dtype": args.dtype, "max_seq_length": args.length,
        "batch_size": args.batch_size, "batch_size_eval": args.batch_size, "max_steps": args.steps,
        "eval_steps": args.steps, "compile": False, "use_gc": False, "query_template": tasks.TEMPLATE,
        "seed": args.seed, "grad_norm_clip": 1.0, "optimizer_type": "AdamW", "optimizer_kwargs": {"lr": args.lr},
        "lr_scheduler": "cosine", "use_amp": False, "autocast_adapter_dtype": True,
        "generation_kwargs": {"max_new_tokens": args.new_tokens}, "attn_implementation": None,
        "init_kv_cache_prefix": None,
    }  # fmt: skip


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--experiment", help="METHOD/NAME; METHOD: " + ", ".join(CONFIGS))
    parser.add_argument("--config", help="folder with an adapter_config.json, instead of the method's default")
    parser.add_argument("--model", help="folder or Hub id of a causal LM")
    parser.add_argument("--data", default="films", help="films, metamath (from the Hub), or a folder of JSON lines")
    parser.add_argument("--device", default="cpu", help="such as cuda")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--length", type=int, default=768, help="tokens of a query and its response at most")
    parser.add_argument("--new-tokens", type=int, default=8, help="tokens of an answer; metamath: 300")
    parser.add_argument("--lr", type=float, default=1e-3, help="of everything but mask scores")
    parser.add_argument("--calibration", type=int, default=32, help="examples to calibrate on")
    parser.add_argument("--max-eval", type=int, default=50, help="examples of valid and of test")
    parser.add_argument("--general-windows", type=int, default=4, help="windows of 256 tokens of WikiText-2")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--results", type=Path, default=FOLDER / "method_comparison", help="folder of the records")
    parser.add_argument("--table", action="store_true", help="only print the table of the records")
    args = parser.parse_args(argv)
    if args.table:
        return print(table(args.results))
    if not args.experiment or (not args.config and args.experiment.split("/")[0] not in CONFIGS):
        parser.error(f"--experiment {args.experiment}: give METHOD/NAME with METHOD one of {', '.join(CONFIGS)}.")
    print("saved:", write_record(args.results, run(args)))


if __name__ == "__main__":
    main()
