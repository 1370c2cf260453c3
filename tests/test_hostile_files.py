"""Adapter files from strangers: a typed error and bounded memory, or the mask that was saved."""

import json
import random
import struct
import tracemalloc

import pytest
import torch
from helpers.methods import final_adapter
from helpers.models import logits, make_bert
from peft import PeftModel, get_peft_model
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from peft_prune import MaskFormatError, MovementPruningConfig, finalize, update_schedule
from peft_prune.layers.layer import pruning_layers
from peft_prune.report.adapter_file import read_adapter
from peft_prune.storage.codec import decode_mask


def rewrite_header(path, change):
    """Change the JSON header of a safetensors file and leave its data alone."""
    data = path.read_bytes()
    (size,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + size])
    change(header)
    new = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(new)) + new + data[8 + size :])


def first(header):
    return next(key for key in header if key != "__metadata__")


def huge_shape(header):
    header[first(header)]["shape"] = [2**62]


def huge_offsets(header):
    header[first(header)]["data_offsets"] = [0, 2**62]


def overlapping(header):
    keys = [key for key in header if key != "__metadata__"]
    header[keys[1]]["data_offsets"] = header[keys[0]]["data_offsets"]


def negative(header):
    header[first(header)]["shape"] = [-8]


def renamed(header):
    header["elsewhere.smp_mask"] = header.pop(first(header))


HEADERS = {
    "size of 2**62": (huge_shape, SafetensorError),
    "offsets of 2**62": (huge_offsets, SafetensorError),
    "overlapping tensors": (overlapping, SafetensorError),
    "negative size": (negative, SafetensorError),
    "renamed tensor": (renamed, MaskFormatError),
}


def refused(folder, error, match=None):
    """Loading raises the error, without much memory, and leaves the base model as it was."""
    base = make_bert()
    weights = {name: p.clone() for name, p in base.named_parameters()}
    tracemalloc.start()
    with pytest.raises(error, match=match):
        PeftModel.from_pretrained(base, folder)
    assert tracemalloc.get_traced_memory()[1] < 2**26
    tracemalloc.stop()
    after = {name.replace(".base_layer", ""): p for name, p in base.named_parameters()}
    assert all(torch.equal(weights[name], after[name]) for name in weights)


@pytest.mark.parametrize("kind", HEADERS)
def test_headers_that_lie(tmp_path, kind):
    final_adapter(tmp_path)
    change, error = HEADERS[kind]
    rewrite_header(tmp_path / "adapter_model.safetensors", change)
    refused(tmp_path, error)


@pytest.mark.parametrize("length", [0, 7, 2**62, 2**64 - 1])
def test_header_lengths_that_lie(tmp_path, length):
    final_adapter(tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    path.write_bytes(struct.pack("<Q", length) + path.read_bytes()[8:])
    refused(tmp_path, SafetensorError)


@pytest.mark.parametrize(
    "change",
    [
        {"bytes": 2**62},
        {"shape": [2**31, 2**31]},
        {"shape": [32, 32, 1]},
        {"kept": -1},
        {"kept": float("nan")},
        {"crc32": 0},
        {"weights": "zz" * 32},
        {"weights": 5},
        {"bytes": True},
        {"block": [2**62, 1]},
        {"block": [32, 1]},
    ],
)
def test_records_that_lie(tmp_path, change):
    final_adapter(tmp_path)
    path = tmp_path / "adapter_config.json"
    config = json.loads(path.read_text())
    name = next(iter(config["mask_info"]))
    config["mask_info"][name] |= change
    config["check_tensors"] = False  # or the config's own checksum is what is told
    path.write_text(json.dumps(config))
    told = rf"mask_info\['{name}'\].*config is damaged|'{name}' is \(32, 32\) in this model"
    refused(tmp_path, ValueError, told)


def test_superfluous_tensors_are_told(tmp_path):
    final_adapter(tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    tensors = load_file(path)
    tensors["base_model.model.bert.pooler.dense.smp_mask"] = torch.ones(8, dtype=torch.uint8)
    save_file(tensors, path)
    refused(tmp_path, MaskFormatError, "pooler.dense.smp_mask.*does not know")


def forge_kept(folder, *names):
    """A record of one weight more than the masks keep, with nothing else that would show."""
    path = folder / "adapter_config.json"
    config = json.loads(path.read_text())
    config["check_tensors"] = False
    for name in names:
        config["mask_info"][name]["kept"] += 1
    path.write_text(json.dumps(config))


def test_a_damaged_mask_is_named_at_load(tmp_path):
    final_adapter(tmp_path, at=0.9)
    first, second = "bert.encoder.layer.0.output.dense", "bert.encoder.layer.1.attention.self.query"
    forge_kept(tmp_path, second, first)
    refused(tmp_path, MaskFormatError, f"The mask of '{first}' keeps")


def test_masks_decoded_at_load_are_those_decoded_later(tmp_path):
    final_adapter(tmp_path, at=0.9)
    at_load = PeftModel.from_pretrained(make_bert(), tmp_path)
    later = PeftModel.from_pretrained(make_bert(), tmp_path, adapter_name="other")
    later.load_adapter(tmp_path, "default")
    for one, two in zip(pruning_layers(at_load), pruning_layers(later), strict=True):
        assert one.host["default"].unpacked is not None
        assert two.host["default"].unpacked is None  # not active
        mask = decode_mask(one.mask["default"], one.shape)
        assert torch.equal(one.get_mask("default"), mask) and torch.equal(two.get_mask("default"), mask)


def test_bits_for_a_record_that_was_forged_too(tmp_path, batch):
    """Whoever forges mask and checksum together still gets a mask of the recorded count, or an error."""
    import zlib

    model = final_adapter(tmp_path, at=0.9)
    del model
    path, config_path = tmp_path / "adapter_model.safetensors", tmp_path / "adapter_config.json"
    tensors, config = load_file(path), json.loads(config_path.read_text())
    name = "bert.encoder.layer.0.output.dense"
    key = f"base_model.model.{name}.smp_mask"
    tensors[key][-1] ^= 0x55
    config["check_tensors"] = False
    config["mask_info"][name]["crc32"] = f"{zlib.crc32(tensors[key].numpy().tobytes()):08x}"
    save_file(tensors, path)
    config_path.write_text(json.dumps(config))
    try:
        logits(PeftModel.from_pretrained(make_bert(), tmp_path), batch)
        assert int(read_adapter(tmp_path).mask(name).sum()) == config["mask_info"][name]["kept"]
    except MaskFormatError as error:
        assert name in str(error)


def movement_adapter(folder, **fields):
    torch.manual_seed(0)
    model = get_peft_model(make_bert(), MovementPruningConfig(sparsity=0.8, **fields))
    update_schedule(model, 10, 10)
    finalize(model)
    model.save_pretrained(folder)


def change_values(change):
    def damage(tensors):
        keys = [key for key in tensors if key.endswith("_values")]
        change(tensors, *keys[:2])

    return damage


VALUES = {
    "one bit flipped": (lambda t, a, b: t[a].__setitem__(5, t[a][5] ^ 4), "values of .*checksum"),
    "one byte short": (lambda t, a, b: t.update({a: t[a][:-1].clone()}), "values of .* should be"),
    "wrong dtype": (lambda t, a, b: t.update({a: t[a].float()}), "values of .*float32"),
    "swapped": (lambda t, a, b: t.update({a: t[b].clone(), b: t[a].clone()}), "values of .*checksum"),
    "missing": (lambda t, a, b: t.pop(a), "holds no values"),
}


@pytest.mark.parametrize("kind", VALUES)
def test_damaged_values(tmp_path, kind):
    movement_adapter(tmp_path, value_dtype="int8")
    change, message = VALUES[kind]
    path = tmp_path / "adapter_model.safetensors"
    tensors = load_file(path)
    change_values(change)(tensors)
    save_file(tensors, path)
    refused(tmp_path, MaskFormatError, message)
    with pytest.raises(MaskFormatError, match=message):
        read_adapter(tmp_path)


@pytest.mark.parametrize(
    "change",
    [{"dtype": "int4"}, {"dtype": "float32"}, {"dtype": []}, {"bytes": 2**62}, {"bytes": True}, {"crc32": 1}, "int8"],
)
def test_records_of_values_that_lie(tmp_path, change):
    movement_adapter(tmp_path, value_dtype="int8")
    path = tmp_path / "adapter_config.json"
    config = json.loads(path.read_text())
    entry = next(iter(config["mask_info"].values()))
    entry["values"] = change if isinstance(change, str) else entry["values"] | change
    path.write_text(json.dumps(config))
    refused(tmp_path, ValueError)


def test_forged_scales_that_are_not_finite(tmp_path, batch):
    """Whoever forges values and checksum together gets an error for NaN, not a model of NaN."""
    import zlib

    movement_adapter(tmp_path, value_dtype="int8")
    path, config_path = tmp_path / "adapter_model.safetensors", tmp_path / "adapter_config.json"
    tensors, config = load_file(path), json.loads(config_path.read_text())
    key = next(key for key in tensors if key.endswith("_values"))
    tensors[key][:4] = torch.tensor([0, 0, 192, 127], dtype=torch.uint8)  # a NaN of float32
    name = key.removeprefix("base_model.model.").removesuffix(".movement_values")
    config["check_tensors"] = False
    config["mask_info"][name]["values"]["crc32"] = f"{zlib.crc32(tensors[key].numpy().tobytes()):08x}"
    save_file(tensors, path)
    config_path.write_text(json.dumps(config))
    loaded = PeftModel.from_pretrained(make_bert(), tmp_path)
    with pytest.raises(MaskFormatError, match="not finite"):
        logits(loaded, batch)


@pytest.mark.slow
def test_fuzz(tmp_path):
    """6,000 random mutations of file or config: the saved masks, or an error that is no crash."""
    final_adapter(tmp_path, at=0.8)
    original = read_adapter(tmp_path)
    masks = {name: original.mask(name) for name in original.tensors}
    files = [tmp_path / "adapter_model.safetensors", tmp_path / "adapter_config.json"]
    contents = [path.read_bytes() for path in files]
    generator = random.Random(0)
    same = 0
    for _ in range(6000):
        which = generator.random() < 0.3
        data = bytearray(contents[which])
        for _ in range(generator.choice([1, 1, 2, 8])):
            position = generator.randrange(len(data) or 1)
            kind = generator.randrange(4)
            if kind == 0 and data:
                data[position] ^= 1 << generator.randrange(8)
            elif kind == 1:
                del data[position : position + generator.randrange(1, 50)]
            elif kind == 2:
                data[position:position] = generator.randbytes(generator.randrange(1, 20))
            else:
                del data[max(position, 1) :]
        files[which].write_bytes(bytes(data))
        try:
            adapter = read_adapter(tmp_path)
            for name, mask in masks.items():
                assert torch.equal(adapter.mask(name), mask)
            same += 1
        except (ValueError, SafetensorError, KeyError, TypeError, RecursionError):
            pass  # UnicodeDecodeError and JSONDecodeError are ValueErrors; KeyError and TypeError are PEFT's own
        files[which].write_bytes(contents[which])
    assert same < 3000  # only changes of what does not matter, such as other fields of the config, may pass
