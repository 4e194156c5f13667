# SPDX-License-Identifier: Apache-2.0
"""What kernels do with activations: "exact" keeps them as they are, "fast" rounds them to 8 bits in
groups of 128: on a CPU to integers, where weights are integers or mxfp4; on a Hopper GPU to e4m3,
where weights are fp8 and a call is long (docs/cuda.md)."""

from .formats import get_format
from .native import _C

MODES = ("exact", "fast")
FORMATS_WITH_FAST = {"cpu": ("int8", "int4", "mxfp4"), "cuda": ("fp8",)}  # by base


def has_fast(format: str, device: str = "cpu") -> bool:
    """device: "cpu", "cuda", or "cuda:0" and so on."""
    return get_format(format).base in FORMATS_WITH_FAST[device.partition(":")[0]]


def default_mode(format: str) -> str:
    """ "fast" where it has integers of 8 bits to multiply and a CPU that does so, else "exact".

    Measured perplexity cannot tell the two apart (docs/accuracy.md), and fast is about twice as
    fast where there are many tokens. A CPU without 8-bit dot products would gain nothing.
    """
    if not has_fast(format):
        return "exact"
    base = get_format(format).base
    name = str(_C.kernel_name(base, "bfloat16", "blocks", "fast"))
    return "fast" if name.endswith("_avx512_vnni") else "exact"
