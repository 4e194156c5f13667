# SPDX-License-Identifier: Apache-2.0
"""mode="auto" rounds activations only where the room that serves the call gains by it."""

import pytest

from expertyard.modes import default_mode
from expertyard.native import _C

EXPECTED = {
    "avx512_vnni": {"int8": "fast", "int4": "fast", "mxfp4": "fast"},
    "avx512": {"int8": "exact", "int4": "fast", "mxfp4": "fast"},
    "avx2": {"int8": "exact", "int4": "fast", "mxfp4": "fast"},
    "scalar": {"int8": "exact", "int4": "exact", "mxfp4": "exact"},
}
RUNNABLE = {k["isa"] for k in _C.kernels() if k["runnable"]}


@pytest.mark.parametrize("isa", EXPECTED)
def test_auto_is_fast_where_the_room_gains(isa):
    if isa not in RUNNABLE:
        pytest.skip(f"this CPU cannot run {isa}")
    _C.force_isa(isa)
    try:
        assert {format: default_mode(format) for format in EXPECTED[isa]} == EXPECTED[isa]
        assert {default_mode(format) for format in ("bf16", "fp8", "fp32")} == {"exact"}
    finally:
        _C.force_isa(None)
