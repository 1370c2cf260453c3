"""Masks know the base model that they were made for."""

import pytest
import torch
from helpers.methods import final_adapter, prune
from helpers.models import logits, make_bert, make_gpt2
from peft import PeftConfig, PeftModel

from peft_prune import MaskFormatError, finalize
from peft_prune.layers.layer import pruning_layers
from peft_prune.storage.fingerprint import agrees, fingerprint


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("made_in", [torch.float32, torch.bfloat16, torch.float16])
def test_copies_in_another_precision_agree(dtype, made_in):
    torch.manual_seed(0)
    for scale in (1e-6, 1e-3, 0.02, 3.0):
        weight = torch.randn(300, 700) * scale
        assert agrees(weight.to(dtype), fingerprint(weight.to(made_in)))
        assert not agrees((weight * 1.02).to(dtype), fingerprint(weight.to(made_in))) or scale == 1e-6


def test_positions_are_the_documented_ones():
    weight = torch.arange(35.0).view(5, 7)
    words = [fingerprint(weight)[i : i + 4] for i in range(0, 64, 4)]
    positions = [k * 2654435761 % 35 for k in range(16)]
    expected = [f"{torch.tensor(float(p)).bfloat16().view(torch.int16).item() & 0xFFFF:04x}" for p in positions]
    assert words == expected


@pytest.mark.parametrize("make", [make_bert, make_gpt2])
def test_another_model_of_the_same_shape_is_told_by_its_first_matrix(tmp_path, make, batch):
    final_adapter(tmp_path, make=make)
    base = make(seed=1)
    dense = logits(base, batch)
    first = r"layer\.0\.attention\.self\.query" if make is make_bert else r"h\.0\.attn\.c_attn"
    with pytest.raises(MaskFormatError, match=rf"weights of '.*{first}' are not those.*check_base = False"):
        PeftModel.from_pretrained(base, tmp_path)
    with pytest.raises(MaskFormatError, match=first):
        base.load_adapter(str(tmp_path))
    assert torch.equal(logits(base, batch), dense)

    config = PeftConfig.from_pretrained(tmp_path)
    config.check_base = False
    masked = logits(PeftModel.from_pretrained(base, tmp_path, config=config), batch)
    assert not torch.equal(masked, dense)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_copies_load(tmp_path, dtype):
    final_adapter(tmp_path)
    loaded = PeftModel.from_pretrained(make_bert().to(dtype), tmp_path)
    assert pruning_layers(loaded)[0].weight.dtype == dtype
    half = prune(make_bert().to(dtype))
    finalize(half)
    half.save_pretrained(tmp_path / "half")
    again = PeftModel.from_pretrained(make_bert(), tmp_path / "half")
    for one, two in zip(pruning_layers(half), pruning_layers(again), strict=True):
        assert torch.equal(one.get_mask("default"), two.get_mask("default"))


def test_what_cannot_be_checked_is_told(tmp_path):
    final_adapter(tmp_path)
    model = PeftModel.from_pretrained(make_bert(), tmp_path)
    model.merge_adapter()
    with pytest.warns(UserWarning, match="cannot be checked for 12 modules.*merged"):
        model.load_adapter(tmp_path, "again")
    with pytest.raises(ValueError, match="is merged. Call model.unmerge_adapter"):
        unfinished = prune(make_bert())
        unfinished.merge_adapter()
        finalize(unfinished)
