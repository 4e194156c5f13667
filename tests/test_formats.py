# SPDX-License-Identifier: Apache-2.0
"""Bytes per expert by the published formulas, tails included."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from expertyard.errors import ConfigError
from expertyard.formats import format_names, get_format
from expertyard.spec import ExpertShape

sizes = st.integers(1, 5000)


def up(a: int, b: int) -> int:
    return math.ceil(a / b)


@given(sizes, sizes)
def test_formulas(h: int, i: int) -> None:
    p = 3 * h * i
    expert = ExpertShape(8, 2, h, i)
    assert expert.bytes("bf16") == expert.bytes("fp16") == 2 * p
    assert expert.bytes("fp32") == 4 * p
    assert expert.bytes("int8") == p + 4 * (2 * i + h)
    assert expert.bytes("fp8") == p + 4 * 3 * up(h, 128) * up(i, 128)
    if h * i % 2 == 0:
        assert expert.bytes("int4") == p // 2 + 2 * (2 * i * up(h, 128) + h * up(i, 128))


@given(sizes.map(lambda n: 32 * n), sizes.map(lambda n: 32 * n))
def test_mxfp4_is_17_bytes_for_32_weights(h: int, i: int) -> None:
    assert ExpertShape(8, 2, h, i).bytes("mxfp4") == 3 * h * i * 17 // 32


def test_biases_are_never_quantised() -> None:
    expert = ExpertShape(8, 2, 2880, 2880, bias=True)
    assert {expert.bias_bytes(name) for name in format_names() if name != "fp32"} == {2 * 3 * 2880}


def test_an_unknown_format_gets_the_nearest() -> None:
    with pytest.raises(ConfigError, match="Did you mean 'int4'"):
        get_format("int44")
