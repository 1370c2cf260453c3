"""Masks at one bit a weight: every device's way gives NumPy's bits."""

import numpy as np
import pytest
import torch

from peft_prune.storage.bits import (
    _pack_by_shifts,
    _unpack_by_shifts,
    count_bits,
    masked_by_bits,
    pack_bits,
    unpack_bits,
)


@pytest.mark.parametrize("shape", [(1, 1), (3, 5), (8, 16), (64, 96), (7, 4097)])
def test_bits_are_those_of_numpy_and_come_back(shape):
    mask = torch.rand(shape) < 0.3
    bits = torch.from_numpy(np.packbits(mask.numpy().reshape(-1), bitorder="little"))
    assert torch.equal(pack_bits(mask), bits)
    assert torch.equal(unpack_bits(bits, shape), mask)
    assert torch.equal(_pack_by_shifts(mask.reshape(-1)), bits)
    assert torch.equal(_unpack_by_shifts(bits)[: mask.numel()].bool().view(shape), mask)


@pytest.mark.parametrize("shape", [(3, 5), (768, 768), (601, 1001)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_a_product_with_bits_is_one_with_the_mask(shape, dtype):
    mask, matrix = torch.rand(shape) < 0.3, torch.randn(shape).to(dtype)
    assert torch.equal(masked_by_bits(matrix, pack_bits(mask)), matrix * mask)
    assert torch.equal(masked_by_bits(matrix.T, pack_bits(mask.T)), (matrix * mask).T)


def test_an_infinite_weight_that_is_removed_is_nan_as_in_a_product_and_nothing_warns(recwarn):
    matrix, mask = torch.tensor([[float("inf"), 1.0]]), torch.tensor([[False, True]])
    assert masked_by_bits(matrix, pack_bits(mask)).isnan().tolist() == [[True, False]]
    assert not recwarn.list


def test_memory_of_a_weight_can_be_freed_after_a_product_as_fsdp_does():
    matrix = torch.randn(4, 8)
    masked_by_bits(matrix, pack_bits(torch.ones(4, 8, dtype=torch.bool)))
    matrix.untyped_storage().resize_(0)
    assert matrix.untyped_storage().size() == 0


def test_a_mask_that_is_no_contiguous_tensor():
    mask = torch.rand(6, 9) < 0.5
    assert torch.equal(unpack_bits(pack_bits(mask.T), (9, 6)), mask.T)


def test_set_bits_are_counted():
    for n in (0, 1, 7, 8, 9, 4097):
        mask = torch.rand(n, generator=torch.Generator().manual_seed(n)) < 0.4
        assert count_bits(pack_bits(mask)) == int(mask.sum())
