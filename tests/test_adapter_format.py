"""The reader that docs/adapter_format.md prints, against what we store."""

import re
from pathlib import Path

import numpy as np
import torch
from conftest import make_gpt2
from peft import get_peft_model
from test_codec import uneven_mask
from test_save_load import final_adapter

from peft_prune import PPruningConfig, calibrate
from peft_prune.masks import entropy
from peft_prune.tuners.layer import pruning_layers


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
    ):
        masks = dict(names["read_masks"](folder))
        layers = pruning_layers(model)
        assert set(masks) == {layer.module_name for layer in layers}
        for layer in layers:
            mask = torch.from_numpy(masks[layer.module_name])
            assert torch.equal(mask, layer.get_mask("default"))
            kinds.add(int(layer.mask["default"][0]))
    assert kinds == {0, 1}  # both codes were read


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
    from peft_prune.masks.selection import topk_mask

    scores, kept = torch.zeros(6, 7), 17
    order = sorted(range(42), key=lambda p: p * 2654435761 % 2**32)
    assert topk_mask(scores, kept).reshape(-1).nonzero().squeeze(1).tolist() == sorted(order[:kept])
