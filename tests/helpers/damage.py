"""Ways in which the files of an adapter may be damaged, and what loading them says."""

import os

from safetensors.torch import load_file, save_file

from helpers.methods import final_adapter, prune
from helpers.models import make_bert
from peft_prune import MaskFormatError


def damage_truncate(folder):
    path = folder / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-40])


def damage_tensors(change):
    def damage(folder):
        path = folder / "adapter_model.safetensors"
        tensors = load_file(path)
        change(tensors, sorted(tensors))
        save_file(tensors, path)

    return damage


def swap(tensors, keys):
    queries = [key for key in keys if "query" in key]
    tensors[queries[0]], tensors[queries[1]] = tensors[queries[1]], tensors[queries[0]]


def flip(tensors, keys):
    tensors[keys[0]][0] ^= 1


def shorten(tensors, keys):
    tensors[keys[0]] = tensors[keys[0]][:-1].clone()


def remove(tensors, keys):
    del tensors[keys[0]]


def cast(tensors, keys):
    tensors[keys[0]] = tensors[keys[0]].float()


def other_file(folder):
    final_adapter(folder / "other", at=0.3)
    os.replace(folder / "other" / "adapter_model.safetensors", folder / "adapter_model.safetensors")


def other_config(folder):
    final_adapter(folder / "other", at=0.3)
    os.replace(folder / "other" / "adapter_config.json", folder / "adapter_config.json")


def scores_for_masks(folder):
    prune(make_bert()).save_pretrained(folder / "other")
    os.replace(folder / "other" / "adapter_model.safetensors", folder / "adapter_model.safetensors")


DAMAGE = {
    "truncated": (damage_truncate, Exception, "(?i)header|incomplete|deserializ"),
    "two tensors swapped": (damage_tensors(swap), MaskFormatError, "query.*does not match its record"),
    "one bit flipped": (damage_tensors(flip), MaskFormatError, "does not match its record"),
    "one byte short": (damage_tensors(shorten), MaskFormatError, "should be .* bytes"),
    "one tensor missing": (damage_tensors(remove), MaskFormatError, "holds no mask for"),
    "wrong dtype": (damage_tensors(cast), MaskFormatError, "float32"),
    "another adapter's file": (other_file, MaskFormatError, "not the one that belongs|another adapter"),
    "another adapter's config": (
        other_config,
        MaskFormatError,
        "is not the one that belongs|belongs to another adapter",
    ),
    "scores instead of masks": (scores_for_masks, MaskFormatError, "holds no mask for"),
}
