# SPDX-License-Identifier: Apache-2.0
"""MXFP4 as gpt-oss has it: `<name>_blocks` U8 [E, out, in / 32, 16] and `<name>_scales` U8
[E, out, in / 32].

w = e2m1(code) * 2^(scale - 127); the low nibble is the first of a pair. Rows are outputs, gate and
up interleaved, although the unquantised parameter is [E, in, out].
"""

from collections.abc import Mapping
from typing import Any

import torch

from ...errors import LoadError
from ...formats import get_format
from ...quantize import QuantizedMatrix
from ..checkpoint import Checkpoint, Matrix, Stored
from .common import expect

__all__ = ["checked_exponents", "claim", "nibbles"]

GROUP = 32


def claim(checkpoint: Checkpoint, settings: Mapping[str, Any]) -> dict[str, Stored]:
    return {
        key.removesuffix("_blocks"): _stored(checkpoint, key.removesuffix("_blocks"))
        for key in checkpoint.keys
        if key.endswith("_blocks")
    }


def _stored(checkpoint: Checkpoint, name: str) -> Stored:
    blocks, scales = f"{name}_blocks", f"{name}_scales"
    found = expect(checkpoint, blocks, ("U8",))
    if len(found) != 4 or found[3] != GROUP // 2 or 0 in found:
        raise LoadError(
            f"{checkpoint.where(blocks)}: expected [experts, out, in / 32, 16], got {list(found)}."
        )
    experts, rows, groups, _ = found
    expect(checkpoint, scales, ("U8", "F8_E8M0"), (experts, rows, groups))
    format = get_format("mxfp4")

    def read(expert: int | None) -> Matrix:
        packed = checkpoint.raw(blocks)[expert or 0].reshape(rows, -1)
        exponents = checkpoint.raw(scales).view(torch.uint8)[expert or 0]
        return QuantizedMatrix(
            format, nibbles(packed), checked_exponents(checkpoint, scales, exponents)
        )

    return Stored((experts, rows, groups * GROUP), "mxfp4", (blocks, scales), read)


def nibbles(octets: torch.Tensor) -> torch.Tensor:
    """uint8 [rows, n] -> [rows, 2n], low nibble first."""
    return torch.stack((octets & 15, octets >> 4), dim=-1).flatten(-2)


def checked_exponents(checkpoint: Checkpoint, key: str, exponents: torch.Tensor) -> torch.Tensor:
    """e8m0 bytes; LoadError for 255, which stands for NaN."""
    if bool((exponents == 255).any()):
        raise LoadError(f"{checkpoint.where(key)}: holds NaN scales. The file is corrupt.")
    return exponents
