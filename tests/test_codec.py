"""The stored form: exact on every shape, and damage is told."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from peft_prune import MaskFormatError
from peft_prune.masks.codec import check_mask, describe_mask, pack_mask, packed_size, unpack_mask


@settings(max_examples=100, deadline=None)
@given(rows=st.integers(0, 20), columns=st.integers(0, 20), seed=st.integers(0, 1000), density=st.floats(0, 1))
def test_round_trip(rows, columns, seed, density):
    generator = torch.Generator().manual_seed(seed)
    mask = torch.rand(rows, columns, generator=generator) < density
    packed = pack_mask(mask)
    assert packed.numel() == packed_size((rows, columns)) == -(-rows * columns // 8)
    assert torch.equal(unpack_mask(packed, (rows, columns)), mask)
    info = describe_mask(packed, (rows, columns))
    assert info["kept"] == int(mask.sum())
    check_mask("layer", packed, info)


def test_bit_order_is_the_documented_one():
    mask = torch.zeros(2, 5, dtype=torch.bool)
    mask[0, 0] = mask[0, 3] = mask[1, 4] = True  # positions 0, 3 and 9
    assert pack_mask(mask).tolist() == [0b0000_1001, 0b0000_0010]


def test_every_single_flipped_bit_is_noticed():
    packed = pack_mask(torch.rand(9, 9) < 0.5)
    info = describe_mask(packed, (9, 9))
    for byte in range(packed.numel()):
        for bit in range(8):
            damaged = packed.clone()
            damaged[byte] ^= 1 << bit
            with pytest.raises(MaskFormatError, match="checksum"):
                check_mask("layer", damaged, info)


def test_wrong_length_and_dtype_are_told():
    packed = pack_mask(torch.rand(9, 9) < 0.5)
    info = describe_mask(packed, (9, 9))
    with pytest.raises(MaskFormatError, match="should be 11 bytes"):
        check_mask("layer", packed[:-1], info)
    with pytest.raises(MaskFormatError, match="float32"):
        check_mask("layer", packed.float(), info)
    with pytest.raises(MaskFormatError, match="takes 2 bytes"):
        unpack_mask(packed, (3, 5))
