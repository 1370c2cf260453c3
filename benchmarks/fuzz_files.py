"""Damaged and hostile files: each is loaded, and either rejected clearly or computes what the file that was saved did.

Half of the mutations are in tensors, half in JSON, over every kind of file that the package writes. Counts go to
`results/fuzz_files.json`. The seed fixes every mutation.

    python benchmarks/fuzz_files.py --files 20000
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import copy
import io
import json
import logging
import random
import resource
import shutil
import signal
import struct
import tempfile
import time
import warnings
from pathlib import Path

import torch
from peft import PeftModel, get_peft_model
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from transformers import BertConfig, BertForSequenceClassification

from peft_prune import (
    DSEEConfig,
    MaskFormatError,
    MovementPruningConfig,
    PPruningConfig,
    SMPConfig,
    calibrate,
    finalize,
    load_compact,
    save_compact,
    update_schedule,
)
from peft_prune.layers.layer import pruning_layers


# errors that say what is wrong; MaskFormatError and JSON's are ValueErrors, the safetensors library has a type of its
# own, and OSError is what Transformers raises for a config that is no JSON
CLEAR = (ValueError, SafetensorError, OSError)
SECONDS = 20
MEMORY = 6 * 2**30  # of addresses, beyond what is in use at the start
BATCH = torch.arange(24).reshape(2, 12) % 90 + 1


class Hang(Exception):
    """Loading took longer than `SECONDS`."""


def base() -> BertForSequenceClassification:
    """A tiny random BERT."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 48}
    return BertForSequenceClassification(
        BertConfig(vocab_size=120, max_position_embeddings=64, initializer_range=0.2, **sizes)
    ).eval()


KINDS = {
    "smp": (lambda: SMPConfig(task_type="SEQ_CLS", sparsity=0.6), True),
    "movement float32": (lambda: MovementPruningConfig(task_type="SEQ_CLS", sparsity=0.6), True),
    "movement int8": (lambda: MovementPruningConfig(task_type="SEQ_CLS", sparsity=0.6, value_dtype="int8"), True),
    "dsee": (lambda: DSEEConfig(task_type="SEQ_CLS", r=2, num_sparse=3, sparsity=0.5), True),
    "ppruning": (lambda: PPruningConfig(task_type="SEQ_CLS", criterion="random", keep_ratio=0.5), True),
    "smp, in training": (lambda: SMPConfig(task_type="SEQ_CLS", sparsity=0.6), False),
    "smp low rank, in training": (
        lambda: SMPConfig(task_type="SEQ_CLS", sparsity=0.6, score="low_rank", score_rank=2),
        False,
    ),
    "movement, in training": (lambda: MovementPruningConfig(task_type="SEQ_CLS", sparsity=0.6), False),
    "dsee, in training": (lambda: DSEEConfig(task_type="SEQ_CLS", r=2, num_sparse=3, sparsity=0.5), False),
    "compact": (None, True),
}


def jitter(model: torch.nn.Module) -> None:
    """Move everything that is trained."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in (p for p in model.parameters() if p.requires_grad):
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))


def write(kind: str, folder: Path) -> None:
    """Save an undamaged file of a kind."""
    make, final = KINDS[kind]
    config = PPruningConfig(criterion="random", keep_ratio=0.5) if make is None else make()
    model = get_peft_model(base(), config)
    if isinstance(config, PPruningConfig):
        calibrate(model)
    else:
        jitter(model)
        update_schedule(model, 10, 10)
        if final:
            finalize(model)
    if make is None:
        save_compact(model.merge_and_unload(), folder)
    else:
        model.save_pretrained(folder)


def compute(kind: str, folder: Path, model: torch.nn.Module) -> torch.Tensor:
    """What a file computes: float, shape (2, labels). Masks are decoded, so that nothing is left to check."""
    loaded = load_compact(folder) if kind == "compact" else PeftModel.from_pretrained(copy.deepcopy(model), folder)
    for layer in pruning_layers(loaded):
        layer.get_mask("default")
    with torch.no_grad():
        return loaded.eval()(input_ids=BATCH).logits


# ----------------------------------------------------------------------- mutations


def in_tensors(path: Path, rng: random.Random) -> str:
    """Damage a safetensors file, and return how."""
    how = rng.choice(["flip", "flip", "flip", "truncate", "insert", "header", "swap", "nan", "dtype", "drop", "noise"])
    data = bytearray(path.read_bytes())
    (size,) = struct.unpack("<Q", data[:8])
    if how == "flip":
        for _ in range(rng.choice([1, 1, 2, 8])):
            data[rng.randrange(8 + size, len(data))] ^= 1 << rng.randrange(8)
    elif how == "truncate":
        del data[rng.randrange(len(data)) :]
    elif how == "insert":
        position = rng.randrange(len(data))
        data[position:position] = rng.randbytes(rng.randrange(1, 20))
    elif how == "noise":
        data[rng.randrange(8 + size)] = rng.randrange(256)
    elif how == "header":
        header = json.loads(data[8 : 8 + size])
        entry = header[rng.choice([key for key in header if key != "__metadata__"])]
        field = rng.choice(["dtype", "shape", "shape", "data_offsets"])
        if field == "dtype":
            entry["dtype"] = rng.choice(["F32", "I32", "F16", "BF16", "U8", "I64", "F64", "BOOL", "X"])
        elif field == "shape":
            entry["shape"] = rng.choice([entry["shape"][::-1], [*entry["shape"], 1], [2**40], [-1], []])
        else:
            entry["data_offsets"] = [rng.randrange(2**12), rng.randrange(2**40)]
        new = json.dumps(header).encode()
        data = bytearray(struct.pack("<Q", len(new)) + new + data[8 + size :])
    else:
        change_tensors(path, how, rng)
        return how
    path.write_bytes(bytes(data))
    return how


def change_tensors(path: Path, how: str, rng: random.Random) -> None:
    """Swap, drop or convert whole tensors."""
    tensors = load_file(path)
    one = rng.choice(sorted(tensors))
    if how == "swap":
        same = [k for k in sorted(tensors) if k != one and tensors[k].dtype == tensors[one].dtype]
        other = rng.choice(same or sorted(tensors))
        tensors[one], tensors[other] = tensors[other].clone(), tensors[one].clone()
    elif how == "nan":
        floats = [k for k in sorted(tensors) if tensors[k].is_floating_point()]
        if floats:
            tensors[rng.choice(floats)].view(-1)[0] = rng.choice([float("nan"), float("inf"), 1e38])
    elif how == "dtype":
        tensors[one] = tensors[one].to(rng.choice([torch.float16, torch.float64, torch.int32, torch.uint8]))
    else:
        name = one if rng.random() < 0.5 else one + ".elsewhere"
        tensor = tensors.pop(one)
        if name != one:
            tensors[name] = tensor
    save_file(tensors, path, metadata={"format": "pt"})


ODD = [
    None, True, False, 0, 1, -1, 3, 2**31, 2**63, 10**30, 0.5, -0.25, 1e308, "", "a", "query", "(a+)+$", "(.*)*.*.*x",
    "(", [], ["x"], [1], {}, {"a": 1}, [[]], [None], "AutoTokenizer", ["AutoTokenizer"], "os", "float16", "LORA", "SMP",
    "CAUSAL_LM", float("nan"), float("inf"),
]  # fmt: skip


def places(value: object) -> list[tuple[object, object]]:
    """Every (container, key) of a JSON value."""
    keys = list(value) if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else []
    return [place for key in keys for place in [(value, key), *places(value[key])]]  # type: ignore[index]


def in_json(path: Path, rng: random.Random) -> str:
    """Change, delete or retype one field of a JSON file, at the top or deep inside, or damage its text."""
    config = json.loads(path.read_text())
    if rng.random() < 0.1:
        text = bytearray(path.read_bytes())
        text[rng.randrange(len(text))] = rng.randrange(256)
        path.write_bytes(bytes(text))
        return "text"
    top = [(config, key) for key in sorted(config)]
    holder, key = rng.choice(top if rng.random() < 0.7 else places(config))
    how = rng.choice(["odd", "odd", "odd", "near", "delete", "rename"])
    if how == "odd":
        holder[key] = copy.deepcopy(rng.choice(ODD))
    elif how == "near":
        holder[key] = near(holder[key], rng)
    elif isinstance(holder, dict) and how == "rename":
        holder[f"{key}x"] = holder.pop(key)
    else:
        del holder[key]
    path.write_text(json.dumps(config))
    return how


def near(value: object, rng: random.Random) -> object:
    """Another value of the same type."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, (int, float)):
        return rng.choice([value + 1, value * 2, value - 1, -value, value / 2, 3_000_000])
    if isinstance(value, str) and value:
        i = rng.randrange(len(value))
        return value[:i] + rng.choice("abc019._") + value[i + 1 :]
    if isinstance(value, list):
        return value[1:] if rng.random() < 0.5 else value + value[:1]
    return rng.choice([1, "x", None])


# -------------------------------------------------------------------------- running


def outcome(kind: str, folder: Path, model: torch.nn.Module, expected: torch.Tensor) -> str:
    """`"rejected"`, `"equal"`, `"DIFFERENT"`, `"hang"`, or `"unclear: <type>"`."""
    signal.alarm(SECONDS)
    try:
        found = compute(kind, folder, model)
    except Hang:
        return "hang"
    except CLEAR:
        return "rejected"
    except Exception as error:
        return f"unclear: {type(error).__name__}: {str(error)[:80]}"
    finally:
        signal.alarm(0)
    return "equal" if found.shape == expected.shape and torch.equal(found, expected) else "DIFFERENT"


def fuzz(files: int, seed: int, show: bool = False) -> dict[str, object]:
    """Mutate and load, and return the counts."""
    assert issubclass(MaskFormatError, ValueError)
    signal.signal(signal.SIGALRM, lambda *_: (_ for _ in ()).throw(Hang()))
    rng, model = random.Random(seed), base()
    counts: dict[str, collections.Counter[str]] = {kind: collections.Counter() for kind in KINDS}
    examples: list[str] = []
    root = Path(tempfile.mkdtemp())
    expected = {}
    for kind in KINDS:
        write(kind, root / kind)
        expected[kind] = compute(kind, root / kind, model)
    started, before = time.time(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for i in range(files):
        kind, target = list(KINDS)[i % len(KINDS)], root / "mutated"
        shutil.rmtree(target, ignore_errors=True)
        shutil.copytree(root / kind, target)
        names = (
            ("model.safetensors", "config.json")
            if kind == "compact"
            else ("adapter_model.safetensors", "adapter_config.json")
        )
        where = i // len(KINDS) % 2
        how = (in_json if where else in_tensors)(target / names[where], rng)
        result = outcome(kind, target, model, expected[kind])
        counts[kind][("json " if where else "tensors ") + result.split(":")[0]] += 1
        if result.startswith(("unclear", "DIFFERENT", "hang")):
            examples.append(f"{kind}, {names[where]}, {how}, file {i}: {result}")
            if show:
                print(examples[-1], flush=True)
    shutil.rmtree(root)
    total = sum(counts.values(), collections.Counter())
    return {
        "files": files,
        "seed": seed,
        "seconds": round(time.time() - started),
        "peak_growth_MB": (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024,
        "different": total["json DIFFERENT"] + total["tensors DIFFERENT"],
        "hangs": total["json hang"] + total["tensors hang"],
        "unclear": total["json unclear"] + total["tensors unclear"],
        "kinds": {kind: dict(sorted(c.items())) for kind, c in counts.items()},
        "unclear_types": dict(
            collections.Counter(e.split(": unclear: ")[1].split(":")[0] for e in examples if "unclear" in e)
        ),
        "examples": examples[:60],
    }


def main() -> None:
    """Run, print a table, write the results."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--files", type=int, default=20000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", default=str(Path(__file__).parent / "results" / "fuzz_files.json"))
    args = parser.parse_args()
    torch.set_num_threads(1)
    quiet()
    address = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (address + MEMORY, address + MEMORY))
    result = fuzz(args.files, args.seed, show=True)
    columns = ["rejected", "equal", "DIFFERENT", "hang", "unclear"]
    print(f"{'kind':28}" + "".join(f"{where + ' ' + c:>19}" for where in ("tensors", "json") for c in columns))
    for kind, row in result["kinds"].items():  # type: ignore[attr-defined]
        numbers = [row.get(f"{where} {c}", 0) for where in ("tensors", "json") for c in columns]
        print(f"{kind:28}" + "".join(f"{n:>19}" for n in numbers))
    print({key: value for key, value in result.items() if key not in ("kinds", "examples")})
    Path(args.output).write_text(json.dumps(result, indent=2) + "\n")


def quiet() -> None:
    """No warnings and no reports of thousands of loads."""
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)


if __name__ == "__main__":
    with contextlib.redirect_stderr(io.StringIO()):
        main()
