# SPDX-License-Identifier: Apache-2.0
"""What CPU kernels do with activations: "exact" keeps them as they are, "fast" rounds them to 8
bits in groups of 128 and multiplies integers."""

from .formats import get_format
from .native import _C

MODES = ("exact", "fast")
FORMATS_WITH_FAST = ("int8", "int4", "mxfp4")  # by base


def has_fast(format: str) -> bool:
    return get_format(format).base in FORMATS_WITH_FAST


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
