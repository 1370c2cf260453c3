"""The reader that docs/adapter_format.md prints, against what we store."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.masks import uneven_mask
from helpers.methods import advance, config, final_adapter
from helpers.models import make_gpt2
from peft import get_peft_model
from safetensors.numpy import load_file

from peft_prune import PPruningConfig, calibrate, finalize
from peft_prune.layers.layer import pruning_layers
from peft_prune.storage import entropy


PAGE = Path(__file__).parents[1] / "docs" / "adapter_format.md"


def heads_and_neurons(folder):
    model = get_peft_model(make_gpt2(), PPruningConfig(criterion="random", keep_ratio=0.7))
    calibrate(model)
    model.save_pretrained(folder)
    return model


def test_documented_reader_reads_our_files(tmp_path):
    (code,) = re.findall(r"^```python\n(.*?)^```", PAGE.read_text(), re.MULTILINE | re.DOTALL)
    names: dict = {}
    exec(code, names)
    kinds = set()
    for folder, model in (
        (tmp_path / "bert", final_adapter(tmp_path / "bert", at=0.7)),
        (tmp_path / "half", final_adapter(tmp_path / "half", at=0.5)),
        (tmp_path / "gpt2", final_adapter(tmp_path / "gpt2", at=0.7, make=make_gpt2)),
        (tmp_path / "heads", heads_and_neurons(tmp_path / "heads")),
        (tmp_path / "2:4", final_adapter(tmp_path / "2:4", at=None, granularity="2:4")),
    ):
        masks = dict(names["read_masks"](folder))
        layers = pruning_layers(model)
        assert set(masks) == {layer.module_name for layer in layers}
        for layer in layers:
            mask = torch.from_numpy(masks[layer.module_name])
            assert torch.equal(mask, layer.get_mask("default"))
            kinds.add(int(layer.mask["default"][0]))
    assert kinds == {0, 1, 2}  # all codes were read


def read(folder, method, **fields):
    """A final adapter of GPT-2, what the documented reader makes of its masks, and all tensors of the file."""
    model = advance(get_peft_model(make_gpt2(), config(method, **fields)), method)
    finalize(model)
    model.save_pretrained(folder)
    names: dict = {}
    exec(*re.findall(r"^```python\n(.*?)^```", PAGE.read_text(), re.MULTILINE | re.DOTALL), names)
    return pruning_layers(model), dict(names["read_masks"](folder)), load_file(folder / "adapter_model.safetensors")


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16", "int8"])
def test_kept_values_are_read_as_documented(dtype, tmp_path):
    layers, masks, tensors = read(tmp_path, "movement", value_dtype=dtype)
    for layer in layers:
        data = tensors[f"base_model.model.{layer.module_name}.movement_values"].tobytes()
        mask = masks[layer.module_name]
        if dtype == "int8":
            scales = np.frombuffer(data[: 4 * len(mask)], "<f4")
            values = np.frombuffer(data[4 * len(mask) :], "i1") * scales[mask.nonzero()[0]]
        elif dtype == "bfloat16":
            values = (np.frombuffer(data, "<u2").astype("<u4") << 16).view("<f4")
        else:
            values = np.frombuffer(data, {"float32": "<f4", "float16": "<f2"}[dtype])
        matrix = np.zeros(mask.shape, "f4")
        matrix[mask] = values
        np.testing.assert_allclose(matrix, layer.adapted("default", layer.matrix).detach().numpy(), rtol=1e-6)


def test_updates_are_read_as_documented(tmp_path):
    layers, masks, tensors = read(tmp_path, "dsee", lora_alpha=6.0, preset="paper")
    fields, updated = json.loads((tmp_path / "adapter_config.json").read_text()), 0
    for layer in layers:
        key = f"base_model.model.{layer.module_name}.dsee_"
        matrix = layer.matrix.detach().numpy() * masks[layer.module_name]
        if f"{key}A" in tensors:
            update = tensors[f"{key}B"] @ tensors[f"{key}A"]
            np.add.at(update.reshape(-1), tensors[f"{key}support"], tensors[f"{key}sparse"])
            third = len(matrix) // 3  # queries, keys, values
            matrix[np.r_[:third, 2 * third : 3 * third]] += fields["lora_alpha"] / fields["r"] * update
            updated += 1
        found = layer.adapted("default", layer.matrix).detach().numpy()
        np.testing.assert_allclose(found, matrix, atol=1e-6, rtol=1e-5)
    assert updated == 2


def test_documented_decoder_reads_every_kind_of_cell():
    (code,) = re.findall(r"^```python\n(.*?)^```", PAGE.read_text(), re.MULTILINE | re.DOTALL)
    names: dict = {}
    exec(code, names)
    mask = uneven_mask(60, 90).numpy()
    mask[:5], mask[5:10] = True, False
    for each in (mask, ~mask, mask.T):
        coded = np.frombuffer(entropy.encode(each), dtype=np.uint8)
        assert coded[0] or coded[1]
        assert (names["read_coded"](coded, *each.shape) == each).all()


def test_documented_tie_break(tmp_path):
    from peft_prune.selection.topk import topk_mask

    scores, kept = torch.zeros(6, 7), 17
    order = sorted(range(42), key=lambda p: p * 2654435761 % 2**32)
    assert topk_mask(scores, kept).reshape(-1).nonzero().squeeze(1).tolist() == sorted(order[:kept])
