"""Files of earlier versions keep loading."""

import zlib
from pathlib import Path

import torch
from conftest import make_bert
from peft import PeftModel

from peft_prune.tuners.layer import pruning_layers


FIXTURES = Path(__file__).parent / "fixtures"


def test_format_1(tmp_path):
    model = PeftModel.from_pretrained(make_bert(), FIXTURES / "format_1")
    masks = b"".join(layer.get_mask("default").numpy().tobytes() for layer in pruning_layers(model))
    assert zlib.crc32(masks) == 1021867223  # of the masks that were saved when version 1 was current
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(make_bert(), tmp_path)
    for one, two in zip(pruning_layers(model), pruning_layers(again), strict=True):
        assert torch.equal(one.get_mask("default"), two.get_mask("default"))
