# SPDX-License-Identifier: Apache-2.0
"""Quantising in native code: plain rounding gives the bits of the torch code that defines it, a
search no greater error, and packing at once the bytes of packing codes."""

import pytest
import torch

from expertyard.errors import KernelError
from expertyard.formats import get_format
from expertyard.native import _C
from expertyard.packing import ExpertPacker
from expertyard.quantize import quantize, quantize_in_torch

FORMATS = [
    "int8", "int8-g128", "int8-g64", "int8-g32", "int4", "int4-g64", "int4-g32",
    "int4-g128-asym", "int4-g64-asym", "int4-g32-asym", "fp8", "fp8-channel", "mxfp4",
]  # fmt: skip
DTYPES = [torch.bfloat16, torch.float16, torch.float32]
SHAPES = [(1, 1), (3, 40), (17, 129), (130, 256), (300, 128), (64, 500)]


def weights(shape, dtype, seed=0):
    """Ordinary numbers, and rows of extraordinary ones."""
    generator = torch.Generator().manual_seed(seed)
    w = torch.randn(shape, generator=generator) * 0.02
    w = w * torch.where(torch.rand(shape, generator=generator) < 0.01, 30, 1)
    odd = torch.tensor([0.0, 1e-30, 1e-38, 3e-41, 1e-45, 60000.0, -5e-8, 2.0**-15, -0.0, 1e30])
    for row in range(0, shape[0], 2):
        if torch.rand(1, generator=generator) < 0.4:
            w[row] *= odd[torch.randint(len(odd), (1,), generator=generator)]
    w = w.to(dtype)
    w[~w.isfinite()] = 1.0
    return w


def equal(got, expected):
    assert got.format == expected.format
    assert torch.equal(got.codes, expected.codes)
    for name in ("scales", "zeros"):
        a, b = getattr(got, name), getattr(expected, name)
        assert (a is None) == (b is None)
        if a is not None:
            assert a.dtype == b.dtype
            assert torch.equal(a.view(torch.uint8), b.contiguous().view(torch.uint8))


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_plain_rounding_gives_the_same_bits(format, dtype):
    form = get_format(format)
    for seed, shape in enumerate(SHAPES):
        w = weights(shape, dtype, seed)
        for scale_dtype in (None, torch.bfloat16, torch.float32):
            equal(
                quantize(w, form, scale_dtype=scale_dtype),
                quantize_in_torch(w, form, scale_dtype=scale_dtype),
            )


@pytest.mark.parametrize("format", ["int8-g32", "int4", "int4-g32-asym", "fp8-channel"])
def test_scales_in_fp16_too(format):
    form = get_format(format)
    w = torch.randn(70, 256, generator=torch.Generator().manual_seed(1)) * 1e-4
    equal(
        quantize(w, form, scale_dtype=torch.float16),
        quantize_in_torch(w, form, scale_dtype=torch.float16),
    )
    with pytest.raises(KernelError, match="scales: expected finite numbers"):
        quantize(w * 1e12, form, scale_dtype=torch.float16)


def test_halves_are_rounded_to_even():
    """Every quotient that lies between two codes, both ways."""
    w = torch.arange(-14, 15).float()[None] / 2  # the largest is 7: scale 1
    w = torch.cat([w, w.new_tensor([[7.0, -7.0, 6.5]])], 1)
    equal(quantize(w, get_format("int4-g32")), quantize_in_torch(w, get_format("int4-g32")))
    assert quantize(w, get_format("int4-g32")).codes[0, 1:4].tolist() == [2, 2, 2]  # -6.5, -6, -5.5


@pytest.mark.parametrize("format", ["fp8", "fp8-channel", "mxfp4"])
def test_every_bfloat16_number_is_rounded_alike(format):
    """With all of them in one row, and beside each only its own power of two."""
    form = get_format(format)
    every = torch.arange(-(1 << 15), 1 << 15).to(torch.int16).view(torch.bfloat16)
    every = every[every.isfinite() & (every.abs() < 1e36)]
    columns = every.numel() // 128 * 128
    for w in (every[:columns].view(-1, 128), every[:columns].view(-1, 128).T.contiguous()):
        equal(quantize(w, form), quantize_in_torch(w, form))


@pytest.mark.parametrize("format", FORMATS)
def test_a_search_errs_no_more(format):
    form = get_format(format)
    for seed, shape in enumerate(SHAPES):
        w = weights(shape, torch.bfloat16, seed)
        exact = w.double()
        here = (quantize(w, form, search=True).dequantize() - exact).square().sum(1)
        there = (quantize_in_torch(w, form, search=True).dequantize() - exact).square().sum(1)
        plain = (quantize(w, form).dequantize() - exact).square().sum(1)
        assert (here <= there * (1 + 1e-5)).all()
        assert (here <= plain * (1 + 1e-5)).all()


@pytest.mark.parametrize("search", [False, True])
@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("sizes", [(128, 256), (72, 40), (300, 130)], ids=str)
def test_packing_plain_weights_is_packing_their_codes(format, sizes, search):
    hidden, inner = sizes
    form = get_format(format)
    for dtype in (torch.bfloat16, torch.float32):
        gate, up = (weights((inner, hidden), dtype, seed) for seed in (1, 2))
        down = weights((inner, hidden), dtype, 3).T  # columns lie apart
        packer = ExpertPacker(2, hidden, inner, format, search=search)
        packer.put(0, gate, up, down)
        packer.put(1, *(quantize(w, form, search=search) for w in (gate, up, down)))
        for a, b in zip(packer.blobs(0), packer.blobs(1), strict=True):
            assert torch.equal(a, b)


def test_rows_that_lie_apart_are_read_where_they_are():
    wide = weights((40, 300), torch.bfloat16)
    form = get_format("int4-g32")
    equal(quantize(wide[::2, 10:110], form), quantize(wide[::2, 10:110].contiguous(), form))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("format", FORMATS)
def test_weights_that_are_no_numbers_are_refused(format, value):
    for dtype in DTYPES:
        w = torch.randn(130, 200).to(dtype)
        w[129, 199] = value
        with pytest.raises(KernelError, match="weight: expected finite numbers"):
            quantize(w, get_format(format))
        packer = ExpertPacker(1, 200, 130, format)
        good = torch.randn(130, 200)
        with pytest.raises(KernelError, match=r"gate\[0\], up\[0\]: weight: expected finite"):
            packer.put(0, good, w, good.T)


def test_native_code_checks_names():
    with pytest.raises(ValueError, match="bf16 has no codes"):
        _C.quantize_rows("bf16", "none", 0, False, False, 1, 1, (0, "float32", 4), (0, 0, 0))
    with pytest.raises(ValueError, match="'int32' is not one of"):
        _C.quantize_rows("int8", "fp32", 0, False, False, 1, 1, (0, "int32", 4), (0, 0, 0))
    with pytest.raises(ValueError, match="k is no multiple of a block of q6_k"):
        _C.quantize_rows("int8", "fp32", 0, False, False, 1, 128, (0, "q6_k", 210), (0, 0, 0))
