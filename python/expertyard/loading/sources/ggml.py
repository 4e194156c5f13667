# SPDX-License-Identifier: Apache-2.0
"""ggml's blocks as quantised matrices. Input: a matrix' blocks as uint8 [rows, blocks, bytes].

Q8_0, Q5_0 -> int8-g32, Q4_0 -> int4-g32, MXFP4 -> mxfp4: exact. Q4_1, Q4_K -> int4-g32-asym: the
codes are the file's; scale and zero (= minimum / scale) are rounded to fp16. Q5_1, Q5_K and Q6_K
have no native format: their blocks are given as they are and quantised anew, to int8-g32 unless
asked otherwise. d and dmin are fp16; a superblock of 256 has eight (Q4_K, Q5_K) or sixteen (Q6_K)
scales.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ...errors import KernelError
from ...formats import get_format
from ...native import _C
from ...quantize import BlockMatrix, QuantizedMatrix
from ..checkpoint import Matrix

__all__ = ["GGML_READERS", "GgmlReader"]


@dataclass(frozen=True)
class GgmlReader:
    """format, loss: as in Stored. read: uint8 [rows, blocks, bytes] -> the matrix; KernelError for
    scales that are not finite."""

    format: str
    read: Callable[[Tensor], Matrix]
    loss: str = ""


def _half(blocks: Tensor, at: int) -> Tensor:
    """The fp16 number at a byte of every block: [rows, blocks]."""
    return blocks[..., at : at + 2].contiguous().view(torch.float16)[..., 0]


def _nibbles(octets: Tensor) -> Tensor:
    """[..., n] -> [..., 2n]: all low nibbles, then all high ones."""
    return torch.cat((octets & 15, octets >> 4), dim=-1)


def _codes(kind: str, blocks: Tensor, weights: int) -> Tensor:
    """csrc/decode.h: one code a byte, [rows, weights]."""
    blocks = blocks.contiguous()
    rows, count, _ = blocks.shape
    out = torch.empty((rows, count * weights), dtype=torch.uint8)
    _C.decode_ggml(kind, blocks.data_ptr(), rows * count, out.data_ptr())
    return out


def _anew(kind: str, blocks: Tensor, weights: int, *scales_at: int) -> BlockMatrix:
    """scales_at: bytes of a block at which fp16 scales are; where they are finite, weights are."""
    for at in scales_at:
        if not bool(torch.isfinite(_half(blocks, at)).all()):
            raise KernelError("scales: expected finite numbers, got NaN or infinity")
    return BlockMatrix(kind, blocks, weights)


def q8_0(blocks: Tensor) -> Matrix:
    codes = (blocks[..., 2:] ^ 128).flatten(-2)
    return QuantizedMatrix(get_format("int8-g32"), codes, _half(blocks, 0))


def q5_0(blocks: Tensor) -> Matrix:
    codes = _codes("q5_0", blocks, 32)
    return QuantizedMatrix(get_format("int8-g32"), codes, _half(blocks, 0))


def q4_0(blocks: Tensor) -> Matrix:
    return QuantizedMatrix(
        get_format("int4-g32"), _nibbles(blocks[..., 2:]).flatten(-2), _half(blocks, 0)
    )


def mxfp4(blocks: Tensor) -> Matrix:
    return QuantizedMatrix(
        get_format("mxfp4"), _nibbles(blocks[..., 1:]).flatten(-2), blocks[..., 0].contiguous()
    )


def q4_1(blocks: Tensor) -> Matrix:
    return _asymmetric(
        _nibbles(blocks[..., 4:]).flatten(-2),
        _half(blocks, 0).float(),
        -_half(blocks, 2).float(),
    )


def q5_1(blocks: Tensor) -> Matrix:
    return _anew("q5_1", blocks, 32, 0, 2)


def _six_bit_scales(packed: Tensor) -> tuple[Tensor, Tensor]:
    """12 bytes -> eight scales and eight minima of six bits each: [..., 8], [..., 8]."""
    first, second, third = packed[..., :4], packed[..., 4:8], packed[..., 8:]
    scales = torch.cat((first & 63, (third & 15) | ((first >> 6) << 4)), dim=-1)
    minima = torch.cat((second & 63, (third >> 4) | ((second >> 6) << 4)), dim=-1)
    return scales, minima


def _k_scales(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """Scale and what is subtracted, for every group of 32: [rows, groups], float32."""
    scales, minima = _six_bit_scales(blocks[..., 4:16])
    scale = _half(blocks, 0).float()[..., None] * scales
    minimum = _half(blocks, 2).float()[..., None] * minima
    return scale.flatten(-2), minimum.flatten(-2)


def q4_k(blocks: Tensor) -> Matrix:
    return _asymmetric(_codes("q4_k", blocks, 256), *_k_scales(blocks))


def q5_k(blocks: Tensor) -> Matrix:
    return _anew("q5_k", blocks, 256, 0, 2)


def q6_k(blocks: Tensor) -> Matrix:
    return _anew("q6_k", blocks, 256, 208)


def _asymmetric(codes: Tensor, scale: Tensor, minimum: Tensor) -> QuantizedMatrix:
    """w = scale * code - minimum as scale * (code - zero).

    A scale of zero makes every weight -minimum: then the minimum is the scale, and codes are zero.
    """
    flat = scale == 0
    if bool(flat.any()):
        scale = torch.where(flat, minimum, scale)
        codes = codes.clone()
        codes.unflatten(-1, (-1, 32)).mul_(~flat[..., None])
    zero = torch.where(flat, torch.ones(()), minimum / torch.where(scale == 0, 1.0, scale))
    return QuantizedMatrix(get_format("int4-g32-asym"), codes, scale.half(), zero.half())


_ROUNDED = "scales and zeros are rounded to fp16 (1 in 2048)"
GGML_READERS: dict[str, GgmlReader] = {
    "Q8_0": GgmlReader("int8-g32", q8_0),
    "Q5_0": GgmlReader("int8-g32", q5_0),
    "Q4_0": GgmlReader("int4-g32", q4_0),
    "MXFP4": GgmlReader("mxfp4", mxfp4),
    "Q4_1": GgmlReader("int4-g32-asym", q4_1, _ROUNDED),
    "Q4_K": GgmlReader("int4-g32-asym", q4_k, _ROUNDED),
    "Q5_1": GgmlReader("int8-g32", q5_1, "5 bits with a minimum: quantised anew to 8 bits"),
    "Q5_K": GgmlReader("int8-g32", q5_k, "5 bits with a minimum: quantised anew to 8 bits"),
    "Q6_K": GgmlReader("int8-g32", q6_k, "groups of 16: quantised anew to groups of 32"),
}
