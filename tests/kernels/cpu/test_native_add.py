"""The native sum of two dtypes: float32 arithmetic, one rounding, any of the operands as output."""

import itertools

import pytest
import torch

from auxkernels import native as native_package

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@pytest.mark.parametrize("size", [0, 1, 15, 4095, 4096, 4097, 200_003])
@pytest.mark.parametrize("dtypes", list(itertools.product(DTYPES, repeat=3)), ids=str)
def test_the_sum_is_that_of_float32_rounded_once(native, dtypes, size):
    a, b = torch.randn(size).to(dtypes[1]), torch.randn(size).to(dtypes[2])
    out = torch.full((size,), torch.nan, dtype=dtypes[0])
    native_package.add(out, a, b)
    assert torch.equal(out, (a.float() + b.float()).to(dtypes[0]))


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_output_may_be_an_operand(native, dtype):
    a, b = torch.randn(10_000).to(dtype), torch.randn(10_000).bfloat16()
    expected = (a.float() + b.float()).to(dtype)
    native_package.add(a, a, b)
    assert torch.equal(a, expected)


def test_every_instruction_set_gives_the_same_bits(native):
    a, b = torch.randn(9_999).bfloat16(), torch.randn(9_999)
    best, results = native.instruction_set(), []
    try:
        for name in native.instruction_sets():
            native.set_instruction_set(name)
            out = torch.empty(9_999, dtype=torch.bfloat16)
            native_package.add(out, a, b)
            results.append(out)
    finally:
        native.set_instruction_set(best)
    assert all(torch.equal(out, results[0]) for out in results)


def test_what_it_cannot_add_is_told_beforehand(native):
    ones = torch.ones(4, 6)
    assert native_package.can_add(ones, ones.bfloat16(), ones.half())
    assert not native_package.can_add(ones, ones.double(), ones)
    assert not native_package.can_add(ones, ones.T.contiguous().T, ones)
    assert not native_package.can_add(ones, ones.to("meta"), ones)


def test_a_dtype_code_that_does_not_exist_is_a_value_error(native):
    with pytest.raises(ValueError, match=r"dtype code must be in \[0, 2\], got 7"):
        native.add((0, 7), (0, 0), (0, 0), 0, 1)
