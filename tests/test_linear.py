# SPDX-License-Identifier: Apache-2.0
"""A packed layer computes what its codes say, on every kernel that runs here and without one."""

from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch

from expertyard.errors import KernelError
from expertyard.formats import get_format
from expertyard.linear import PackedLinear, plain_linear
from expertyard.native import _C
from expertyard.quantize import quantize

FORMATS = [
    "int8", "int8-g32", "int4", "int4-g32", "int4-g64-asym", "int4-g32-asym", "fp8", "fp8-channel",
    "mxfp4",
]  # fmt: skip
ISAS = sorted({k["isa"] for k in _C.kernels() if k["runnable"] and k["layout"] == "blocks"})
SHAPES = [(64, 128), (200, 384), (1, 32), (33, 130), (300, 96)]  # [out, in]: tails of all kinds


@contextmanager
def forced_isa(isa):
    before = _C.forced_isa()
    _C.force_isa(isa)
    try:
        yield
    finally:
        _C.force_isa(before)


def layer(format, out, inner, scale_dtype=None, bias=False):
    generator = torch.Generator().manual_seed(out * 1000 + inner)
    weight = torch.randn(out, inner, generator=generator) * 0.05
    own = scale_dtype if format != "mxfp4" else None
    matrix = quantize(weight, get_format(format), scale_dtype=own)
    made = PackedLinear(
        inner, out, torch.nn.Parameter(torch.randn(out, generator=generator)) if bias else None
    )
    made.put(matrix)
    return made, matrix.dequantize()


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("format", FORMATS)
def test_a_blob_is_unpacked_exactly(format, shape):
    for scale_dtype in (torch.float16, torch.float32, torch.bfloat16):
        made, truth = layer(format, *shape, scale_dtype)
        assert torch.equal(made.dequantize(torch.float64), truth)


@pytest.mark.parametrize("tokens", [0, 1, 7, 300])
@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("format", FORMATS)
def test_every_kernel_matches_float64(format, isa, tokens):
    for shape in SHAPES:
        made, truth = layer(format, *shape, bias=True)
        x = torch.randn(tokens, shape[1], generator=torch.Generator().manual_seed(tokens))
        for dtype in (torch.float32, torch.bfloat16):
            if not any(
                k["isa"] == isa and k["format"] == get_format(format).base and k["runnable"]
                and k["layout"] == "blocks" and k["mode"] == "exact"
                and (dtype == torch.bfloat16 or not k["bf16_inputs"])
                for k in _C.kernels()
            ):  # fmt: skip
                continue
            given = x.to(dtype)
            expected = given.double() @ truth.T + made.bias.double()
            with forced_isa(isa), torch.no_grad():
                got = made(given[None])[0]
            tolerance = 1e-4 if dtype == torch.float32 else 0.03
            torch.testing.assert_close(got.double(), expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("flush", [False, True], ids=["", "denormals-are-zeros"])
@pytest.mark.parametrize("isa", ISAS)
def test_every_code_of_fp8_has_its_value(isa, flush):
    """Subnormal ones too, whatever torch does to subnormals; a row with a NaN in it is NaN."""
    if not any(
        k["isa"] == isa and k["format"] == "fp8" and k["runnable"] and not k["bf16_inputs"]
        for k in _C.kernels()
    ):
        pytest.skip("no kernel for fp32 hidden states")
    inner = 300  # panels and tiles end within a group
    codes = torch.arange(64)[:, None] * 4 + torch.arange(inner) & 0xFF
    codes[codes & 0x7F == 0x7F] = 0
    like = quantize(torch.ones(64, inner), get_format("fp8-channel"))
    matrix = replace(like, codes=codes.to(torch.uint8), scales=torch.ones_like(like.scales))
    truth = matrix.dequantize()
    assert {*truth.unique().tolist()} >= {2**-9, -(2**-9), 448}
    broken = matrix.codes.clone()
    broken[3, 299], broken[40, 5] = 0x7F, 0xFF
    made, ill = (PackedLinear(inner, 64, None) for _ in range(2))
    made.put(matrix)
    ill.put(replace(matrix, codes=broken))
    assert torch.set_flush_denormal(flush)
    try:
        with forced_isa(isa), torch.no_grad():
            for x in (torch.eye(inner), torch.eye(inner)[7:12], torch.eye(inner)[4:5]):
                assert torch.equal(made(x).double(), x.double() @ truth.T)
                nan = ill(x).isnan()
                assert nan[:, [3, 40]].all() and nan.sum() == 2 * len(x)
    finally:
        torch.set_flush_denormal(False)


@pytest.mark.parametrize("format", FORMATS)
def test_without_a_kernel_it_is_made_plain_for_a_call(format):
    """What CUDA devices do, here on the CPU."""
    made, truth = layer(format, 200, 384)
    x = torch.randn(5, 384)
    got = plain_linear(x, made.packed, 200, made._code, made._group)
    torch.testing.assert_close(got.double(), x.double() @ truth.T, rtol=1e-4, atol=1e-4)


def test_memory_is_that_of_the_codes_and_scales():
    made, _ = layer("int4-g32", 256, 512)
    assert made.nbytes == 256 * 512 // 2 + 256 * 512 // 32 * 2
    assert not list(made.parameters()) and not made.state_dict()


def test_any_number_of_threads_gives_the_same_bits():
    made, _ = layer("int4", 500, 384)
    x = torch.randn(64, 384)
    found = []
    before = torch.get_num_threads()
    for threads in (1, 2, 5):
        torch.set_num_threads(threads)
        found.append(made(x))
    torch.set_num_threads(before)
    assert all(torch.equal(found[0], other) for other in found)


def test_what_does_not_fit_is_an_error():
    made, _ = layer("int4", 64, 128)
    with pytest.raises(KernelError, match=r"weight: expected uint8 \[\d+\] for out_features=64"):
        torch.ops.expertyard.linear(torch.ones(1, 128), made.packed, 64, made._code, made._group)
        made.packed = made.packed[:-64]
        made(torch.ones(1, 128))
    with pytest.raises(KernelError, match="loading the model did not finish"):
        PackedLinear(4, 4, None)(torch.ones(1, 4))
    for packing, group in ((0xFF, 0), (2, 7), (1 << 40, 32), (0, 0)):
        with pytest.raises(RuntimeError, match=r"packing: expected _C\.linear_packing"):
            torch.ops.expertyard.linear(torch.ones(1, 128), made.packed, 64, packing, group)


def test_a_compiler_sees_one_graph():
    made, _ = layer("int4", 64, 128)
    x = torch.randn(3, 128)
    assert torch.equal(torch.compile(made, fullgraph=True, backend="aot_eager")(x), made(x))


def test_backward_is_refused():
    made, _ = layer("int4", 64, 128)
    out = made(torch.ones(1, 128, requires_grad=True))
    with pytest.raises(KernelError, match='dense="plain"'):
        out.sum().backward()
