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
    """ "fast" where measured perplexity cannot tell it apart (docs/accuracy.md) and this CPU gains.

    With VNNI that is int8, int4 and mxfp4: about twice as fast where there are many tokens. With
    AVX2 or AVX-512 alone it is the 4-bit ones (docs/cpu.md): 8-bit codes gain nothing where an
    expert has few tokens.
    """
    if not has_fast(format):
        return "exact"
    base = get_format(format).base
    isa = str(_C.kernel_name(base, "bfloat16", "blocks", "fast")).partition("_fast_")[2]
    if isa == "avx512_vnni" or (isa in ("avx2", "avx512") and base != "int8"):
        return "fast"
    return "exact"
