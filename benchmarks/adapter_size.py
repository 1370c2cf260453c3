"""Bytes of mask adapters against the entropy of independent bits, time to code them, and what many of them cost.

    python benchmarks/adapter_size.py                       # random masks of BERT-base's shape; memory; load time
    python benchmarks/adapter_size.py --adapter runs/quickstart/adapter   # masks that were really trained

CPU seconds of one thread. Results go to `benchmarks/results/adapter_size.json`.
"""

from __future__ import annotations

import os
import platform
import tempfile
import time
import zlib
from pathlib import Path


os.environ.setdefault("HF_HUB_OFFLINE", "1")

import numpy as np
import torch
import zstandard
from peft import LoraConfig, PeftModel, get_peft_model
from scaffold import FOLDER, make_parser, markdown, write
from transformers import BertConfig, BertModel

from peft_prune import SMPConfig, finalize, update_schedule
from peft_prune.layers.layer import pruning_layers
from peft_prune.report.adapter_file import binary_entropy, read_adapter
from peft_prune.storage.codec import decode_mask, encode_mask, pack_mask


RESULTS = FOLDER / "adapter_size.json"
BERT_BASE = [(768, 768)] * 48 + [(3072, 768)] * 12 + [(768, 3072)] * 12


def sizes(masks: list[torch.Tensor]) -> dict[str, float]:
    """Bytes of some masks in several forms, and the time that ours takes."""
    start = time.process_time()
    coded = [encode_mask(mask) for mask in masks]
    encode = time.process_time() - start
    start = time.process_time()
    decoded = [decode_mask(c, tuple(m.shape)) for c, m in zip(coded, masks, strict=True)]
    decode = time.process_time() - start
    assert all(torch.equal(a, b) for a, b in zip(decoded, masks, strict=True))
    packed = [pack_mask(mask).numpy().tobytes() for mask in masks]
    entropy = sum(m.numel() * binary_entropy(m.float().mean().item()) / 8 for m in masks)
    return {
        "weights": sum(m.numel() for m in masks),
        "density": float(np.mean([m.float().mean().item() for m in masks])),
        "entropy": entropy,
        "ours": sum(c.numel() for c in coded),
        "packed": sum(map(len, packed)),
        "zlib": sum(len(zlib.compress(p, 6)) for p in packed),
        "zstd": sum(len(zstandard.compress(p, 19)) for p in packed),
        "encode_s": encode,
        "decode_s": decode,
    }


def random_masks(density: float) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.rand(shape, generator=generator) < density for shape in BERT_BASE]


def serving() -> dict[str, float]:
    """Load time beside LoRA r = 8 on the same modules, and memory of 1, 10 and 100 masks, for BERT-base's shape."""
    result: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as folder:
        base = BertModel(BertConfig())
        model = get_peft_model(base, SMPConfig(sparsity=0.9))
        update_schedule(model, 1, 1)
        finalize(model)
        model.save_pretrained(f"{folder}/smp")
        base = model.unload()
        targets = sorted({layer.rsplit(".", 1)[1] for layer in model.peft_config["default"].mask_info})
        lora = get_peft_model(base, LoraConfig(r=8, target_modules=[*targets]))
        lora.save_pretrained(f"{folder}/lora")
        base = lora.unload()
        ids = torch.randint(0, 30000, (1, 8))
        for _ in range(2):  # the first round warms up
            for kind in ("lora", "smp"):
                start = time.process_time()
                loaded = PeftModel.from_pretrained(base, f"{folder}/{kind}")
                result[f"load_{kind}_s"] = time.process_time() - start
                with torch.no_grad():
                    loaded(ids)
                result[f"load_and_first_forward_{kind}_s"] = time.process_time() - start
                result[f"file_{kind}_bytes"] = os.path.getsize(f"{folder}/{kind}/adapter_model.safetensors")
                base = loaded.unload()
        loaded = PeftModel.from_pretrained(base, f"{folder}/smp", adapter_name="m0")
        for count in (1, 10, 100):
            for i in range(len(loaded.peft_config), count):
                loaded.load_adapter(f"{folder}/smp", f"m{i}")
            layers = pruning_layers(loaded)
            result[f"bytes_of_{count}_masks"] = sum(b.numel() for m in layers for b in m.mask.buffers())
        with torch.no_grad():
            loaded(ids)
        result["bytes_of_the_mask_in_use"] = sum(m.numel() for x in layers for *_, m in x._masks.values())
    return result


def table(rows: dict[str, dict[str, float]]) -> str:
    """Markdown, bytes as multiples of the entropy of independent bits."""
    forms = ("ours", "packed", "zlib", "zstd")
    heads = [
        "masks",
        "weights",
        "density",
        "entropy, bytes",
        *(f"{f} ÷ entropy" for f in forms),
        "encode s",
        "decode s",
    ]
    lines = []
    for name, r in rows.items():
        ratios = [f"{r[f] / r['entropy']:.4f}" for f in forms]
        cells = [name, f"{r['weights']:,}", f"{r['density']:.3f}", f"{r['entropy']:,.0f}", *ratios]
        lines.append([*cells, f"{r['encode_s']:.2f}", f"{r['decode_s']:.2f}"])
    return markdown(heads, lines)


def main() -> None:
    parser = make_parser(__doc__, RESULTS)
    parser.add_argument("--adapter", nargs="*", default=[], help="folders of trained adapters to measure as well")
    args = parser.parse_args()
    torch.set_num_threads(1)
    rows = {f"random, density {d}": sizes(random_masks(d)) for d in (0.5, 0.3, 0.1, 0.05, 0.03)}
    for folder in args.adapter:
        adapter = read_adapter(folder)
        rows[f"trained, {Path(folder).name}"] = sizes([adapter.mask(name) for name in adapter.tensors])
    print(table(rows))
    many = serving()
    for key, value in many.items():
        print(f"{key:36} {value:,.3f}" if isinstance(value, float) else f"{key:36} {value:,}")
    machine = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "machine": platform.machine(),
        "threads": 1,
    }
    write(args.results, {"machine": machine, "sizes": rows, "serving": many})


if __name__ == "__main__":
    main()
