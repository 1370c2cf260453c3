"""The stored form: exact on every shape and density, near the entropy bound, and damage is told."""

import math

import numpy as np
import pytest
import torch
from helpers.masks import uneven_mask
from hypothesis import given, settings
from hypothesis import strategies as st

from peft_prune import MaskFormatError
from peft_prune.storage import entropy, groups
from peft_prune.storage.codec import (
    VERSION,
    decode_bits,
    decode_mask,
    describe_mask,
    encode_mask,
    is_mask_info,
    load_bits,
    load_mask,
    mask_to_blocks,
    pack_mask,
    packed_size,
    unpack_mask,
)


def random_mask(rows, columns, density, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(rows, columns, generator=generator) < density


def bound(mask):
    """Bytes of the entropy of independent bits at the mask's density."""
    p = mask.float().mean().item()
    return 0.0 if p in (0, 1) else -mask.numel() / 8 * (p * np.log2(p) + (1 - p) * np.log2(1 - p))


@settings(max_examples=150, deadline=None)
@given(rows=st.integers(0, 40), columns=st.integers(0, 40), seed=st.integers(0, 1000), density=st.floats(0, 1))
def test_round_trip_of_both_forms(rows, columns, seed, density):
    for mask in (random_mask(rows, columns, density, seed), uneven_mask(rows, columns, seed)):
        packed = pack_mask(mask)
        assert packed.numel() == packed_size((rows, columns)) == -(-rows * columns // 8)
        assert torch.equal(unpack_mask(packed, (rows, columns)), mask)
        stored = encode_mask(mask)
        assert stored.dtype == torch.uint8 and stored.numel() <= packed.numel() + 1
        assert torch.equal(decode_mask(stored, (rows, columns)), mask)
        if mask.numel():
            coded = np.frombuffer(entropy.encode(mask.numpy()), dtype=np.uint8)
            assert (entropy.decode(coded, (rows, columns)) == mask.numpy()).all()
            info = describe_mask(stored, mask)
            assert is_mask_info(info) and info["kept"] == int(mask.sum())
            assert torch.equal(load_mask("layer", stored, info, VERSION), mask)


@pytest.mark.parametrize("shape", [(1, 1), (1, 4096), (4096, 1), (768, 3072), (17, 1000)])
@pytest.mark.parametrize("density", [0, 1e-3, 0.03, 0.5, 0.999, 1])
def test_shapes_and_densities(shape, density):
    mask = random_mask(*shape, density)
    assert torch.equal(decode_mask(encode_mask(mask), shape), mask)


@pytest.mark.parametrize("shape", [(1, 1), (3, 5), (17, 23), (64, 96)])
def test_packed_is_what_numpy_packs_of_the_mask(shape):
    empty, full = torch.zeros(shape, dtype=torch.bool), torch.ones(shape, dtype=torch.bool)
    for mask in (random_mask(*shape, 0.1), random_mask(*shape, 0.5), uneven_mask(*shape), empty, full):
        expected = np.packbits(mask.numpy().reshape(-1), bitorder="little").tolist()
        coded = np.frombuffer(b"\x01" + entropy.encode(mask.numpy()), dtype=np.uint8).copy()
        plain = np.array([0, *expected], dtype=np.uint8)
        for stored in (torch.from_numpy(coded), torch.from_numpy(plain)):
            assert decode_bits(stored, shape).tolist() == expected
            assert load_bits("layer", stored, describe_mask(stored, mask), 3).tolist() == expected


def test_bits_after_the_last_weight_are_dropped():
    """A file may have them set; they are no weights, and are not counted."""
    mask = random_mask(3, 5, 0.5)
    plain = torch.cat([torch.zeros(1, dtype=torch.uint8), pack_mask(mask)])
    plain[-1] |= 0x80
    assert load_bits("layer", plain, describe_mask(plain, mask), 3).tolist() == pack_mask(mask).tolist()
    version_1 = plain[1:]
    assert decode_bits(version_1, (3, 5), 1).tolist() == pack_mask(mask).tolist()
    assert version_1[-1] & 0x80  # what is stored stays as it is


def test_size_is_the_entropy_bound_for_independent_bits():
    for density in (0.5, 0.3, 0.1, 0.05, 0.03):
        mask = random_mask(768, 768, density)
        assert encode_mask(mask).numel() <= 1.002 * bound(mask) + 8
    assert encode_mask(torch.zeros(768, 768, dtype=torch.bool)).numel() < 16
    assert encode_mask(torch.ones(768, 768, dtype=torch.bool)).numel() < 16


def test_size_is_below_the_bound_where_rows_and_columns_differ():
    mask = uneven_mask(768, 768)
    assert encode_mask(mask).numel() < 0.85 * bound(mask)


@pytest.mark.parametrize(("n", "m"), [(1, 2), (1, 4), (2, 4), (3, 4), (4, 8)])
@pytest.mark.parametrize("shape", [(64, 512), (7, 8 * 9), (33, 4 * 2 * 13 + 8)])
def test_n_of_m_takes_as_many_bits_as_there_are_groups(n, m, shape):
    generator = torch.Generator().manual_seed(0)
    chosen = torch.rand(shape[0] * shape[1] // m, m, generator=generator).argsort(1) < n
    mask = chosen.view(shape)
    stored = encode_mask(mask)
    choices = math.comb(m, n)
    assert int(stored[0]) == 2 and stored.numel() <= mask.numel() / m * math.log2(choices) / 8 + 20
    assert torch.equal(decode_mask(stored, shape), mask)
    with pytest.raises(MaskFormatError, match="first byte, 2"):
        decode_mask(stored, shape, version=3)
    with pytest.raises(MaskFormatError, match="n:m code"):
        decode_mask(stored, (shape[0], shape[1] + 1))
    for position in range(stored.numel()):
        altered = stored.clone()
        altered[position] ^= 1
        try:
            found = decode_mask(altered, shape)
        except MaskFormatError:
            continue
        assert position > 2 and (found.view(-1, m).sum(1) == n).all()  # another mask, which the checksum tells


def test_n_of_m_whose_last_byte_is_not_full():
    mask = torch.tensor([True, False, False, True]).repeat(3, 101)
    mask[0] = torch.tensor([False, True, True, False]).repeat(101)
    coded = np.frombuffer(groups.encode(mask.numpy(), 2, 4), dtype=np.uint8)
    assert groups.pattern_of(mask.numpy()) == (1, 2) and mask.numel() % 8 == 4
    packed = groups.decode_packed(coded, tuple(mask.shape))
    assert torch.equal(unpack_mask(torch.from_numpy(packed), tuple(mask.shape)), mask)
    assert groups.pattern_of(torch.ones(4, 8, dtype=torch.bool).numpy()) is None
    assert groups.pattern_of(mask.numpy()[:, :5]) is None


def test_frequencies_are_whole_and_complete():
    for q in (1, 2, 1000, 32767, 32768, 60000, 65534):
        weights = np.array(entropy.byte_frequencies(q))[entropy._BITS]
        left = 2**24 - 256 - weights.sum()
        assert (weights >= 0).all() and 0 <= left < 256


def test_bit_order_of_the_plain_form_is_the_documented_one():
    mask = torch.zeros(2, 5, dtype=torch.bool)
    mask[0, 0] = mask[0, 3] = mask[1, 4] = True  # positions 0, 3 and 9
    assert pack_mask(mask).tolist() == [0b0000_1001, 0b0000_0010]


@pytest.mark.parametrize("mask", [random_mask(9, 9, 0.5), uneven_mask(64, 64)], ids=["plain", "coded"])
def test_every_single_flipped_bit_is_noticed(mask):
    stored = encode_mask(mask)
    info = describe_mask(stored, mask)
    for byte in range(stored.numel()):
        for bit in range(8):
            damaged = stored.clone()
            damaged[byte] ^= 1 << bit
            with pytest.raises(MaskFormatError, match="'layer' does not match its record"):
                load_mask("layer", damaged, info, 2)


@pytest.mark.parametrize("block", [(6, 1), (1, 8), (3, 2), (6, 8), (1, 1)])
def test_masks_of_blocks(block):
    grid = random_mask(6 // block[0], 8 // block[1], 0.5)
    mask = torch.from_numpy(np.kron(grid.numpy(), np.ones(block, dtype=bool)))
    assert torch.equal(mask_to_blocks(mask, block), grid)
    stored = encode_mask(grid)
    info = describe_mask(stored, mask, block)
    assert is_mask_info(info) and info["shape"] == [6, 8] and info["kept"] == int(mask.sum())
    assert torch.equal(load_mask("layer", stored, info, 3), mask)


def test_blocks_that_do_not_fit_are_told():
    mask = torch.ones(4, 6, dtype=torch.bool)
    mask[0, 0] = False
    with pytest.raises(ValueError, match="parts of blocks"):
        mask_to_blocks(mask, (4, 1))
    info = {"shape": [4, 6], "kept": 20, "bytes": 2, "crc32": "0" * 8}
    assert is_mask_info(info | {"block": [4, 1]})
    for block in ([3, 1], [4, 4], [0, 1], [-4, 1], [4], [4.0, 1], [True, 1], "41", [8, 1], [2, 3]):
        assert not is_mask_info(info | {"block": block}), block


def test_wrong_length_dtype_and_count_are_told():
    mask = random_mask(9, 9, 0.5)
    stored = encode_mask(mask)
    info = describe_mask(stored, mask)
    with pytest.raises(MaskFormatError, match="should be 12 bytes"):
        load_mask("layer", stored[:-1], info, 2)
    with pytest.raises(MaskFormatError, match="float32"):
        load_mask("layer", stored.float(), info, 2)
    with pytest.raises(MaskFormatError, match="keeps .* weights, but adapter_config.json records"):
        load_mask("layer", stored, info | {"kept": info["kept"] + 1}, 2)
    with pytest.raises(MaskFormatError, match="'layer' cannot be read: .*takes 8 bytes"):
        load_mask("layer", stored, info | {"shape": [8, 8]}, 2)
    with pytest.raises(MaskFormatError, match="no known code"):
        decode_mask(torch.tensor([7, 0], dtype=torch.uint8), (2, 2))
    with pytest.raises(MaskFormatError, match="takes 2 bytes"):
        unpack_mask(pack_mask(mask), (3, 5))


@settings(max_examples=400, deadline=None)
@given(
    kind=st.sampled_from([b"\x01", b"\x02", b"\x02\x01\x02", b"\x02\x02\x04"]), data=st.binary(max_size=200),
    rows=st.integers(1, 30), columns=st.integers(1, 30),
)  # fmt: skip
def test_arbitrary_bytes_give_a_mask_or_a_typed_error(kind, data, rows, columns):
    stored = torch.frombuffer(bytearray(kind + data), dtype=torch.uint8)
    try:
        mask = decode_mask(stored, (rows, columns))
    except MaskFormatError:
        return
    assert mask.shape == (rows, columns) and mask.dtype == torch.bool


@settings(max_examples=300, deadline=None)
@given(seed=st.integers(0, 50), data=st.data())
def test_altered_code_with_a_matching_checksum_never_gives_another_count(seed, data):
    """A file forged with its checksum: what is decoded has the recorded number of weights, or an error is raised."""
    mask = uneven_mask(40, 40, seed)
    stored = encode_mask(mask)
    position = data.draw(st.integers(0, stored.numel() - 1))
    stored[position] = data.draw(st.integers(0, 255))
    info = describe_mask(stored, mask)
    try:
        assert int(load_mask("layer", stored, info, VERSION).sum()) == info["kept"]
    except MaskFormatError:
        pass
