"""Files of earlier versions keep loading."""

import zlib
from pathlib import Path

import pytest
import torch
from helpers.models import make_bert
from peft import PeftModel

from peft_prune.layers.layer import pruning_layers


FIXTURES = Path(__file__).parent / "fixtures"


# of the masks that were saved when these versions were current
@pytest.mark.parametrize(("version", "checksum"), [(1, 1021867223), (2, 3634452421)])
def test_old_formats(version, checksum, tmp_path):
    model = PeftModel.from_pretrained(make_bert(), FIXTURES / f"format_{version}")
    masks = b"".join(layer.get_mask("default").numpy().tobytes() for layer in pruning_layers(model))
    assert zlib.crc32(masks) == checksum
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(make_bert(), tmp_path)
    for one, two in zip(pruning_layers(model), pruning_layers(again), strict=True):
        assert torch.equal(one.get_mask("default"), two.get_mask("default"))
