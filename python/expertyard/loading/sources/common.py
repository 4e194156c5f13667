# SPDX-License-Identifier: Apache-2.0
"""What the layouts share: checks that name file and tensor, bits out of words, groups of scales."""

from collections.abc import Sequence

import torch
from torch import Tensor

from ...errors import LoadError
from ...formats import get_format
from ...native import _C
from ..checkpoint import FLOATS, Checkpoint

__all__ = [
    "GROUPS",
    "KINDS",
    "checked_scales",
    "expect",
    "group_format",
    "native_group",
    "spread",
    "unpack",
    "unpack_inputs",
]

KINDS = tuple(FLOATS)
GROUPS = (128, 64, 32)  # group sizes that the native int4 and int8 formats have


def expect(
    checkpoint: Checkpoint, key: str, kinds: Sequence[str], shape: Sequence[int] | None = None
) -> tuple[int, ...]:
    """The shape of a tensor; LoadError if it is missing, or of another dtype or shape."""
    if not checkpoint.has(key):
        like = next(iter(checkpoint.files))
        raise LoadError(
            f"tensor {key!r} is missing, though its neighbours are in {like.parent}. Download the "
            "missing files again."
        )
    got = checkpoint.kind(key)
    if got not in kinds:
        raise LoadError(f"{checkpoint.where(key)}: expected {' or '.join(kinds)}, got {got}.")
    found = checkpoint.shape(key)
    if shape is not None and found != tuple(shape):
        raise LoadError(
            f"{checkpoint.where(key)}: expected shape {list(shape)}, got {list(found)}."
        )
    return found


def checked_scales(checkpoint: Checkpoint, key: str, expert: int | None = None) -> Tensor:
    """The scales in their own dtype; LoadError if one of them is not a finite number."""
    scales = checkpoint.raw(key)
    if expert is not None:
        scales = scales[expert]
    if not bool(torch.isfinite(scales).all()):
        raise LoadError(
            f"{checkpoint.where(key)}: holds NaN or infinite scales. The file is corrupt, or the "
            "quantisation that made it failed."
        )
    return scales


def unpack(words: Tensor, bits: int) -> Tensor:
    """int32 [rows, words] -> uint8 [rows, words * 32 / bits], the lowest bits of a word first."""
    octets = words.contiguous().view(torch.uint8)
    if bits == 8:
        return octets
    out = torch.empty((*octets.shape, 2), dtype=torch.uint8)
    torch.bitwise_and(octets, 15, out=out[..., 0])
    torch.bitwise_right_shift(octets, 4, out=out[..., 1])
    return out.flatten(-2)


def unpack_inputs(words: Tensor, awq: bool) -> Tensor:
    """GPTQ's and AWQ's qweight of 4 bits -> codes [out, in]."""
    words = words.contiguous()
    inputs, outputs = words.shape
    inputs, outputs = (inputs, outputs * 8) if awq else (inputs * 8, outputs)
    codes = torch.empty((outputs, inputs), dtype=torch.uint8)
    _C.decode_words(awq, words.data_ptr(), inputs, outputs, codes.data_ptr())
    return codes


def native_group(group: int, columns: int) -> int | None:
    """The largest native group that divides a group of the file; None if there is none."""
    if group >= columns:
        return GROUPS[0]  # one scale a row: the same scale in every group
    return next((size for size in GROUPS if group % size == 0), None)


def spread(scales: Tensor, group: int, native: int, columns: int) -> Tensor:
    """[rows, groups of the file] -> [rows, native groups]: a scale for each, repeated."""
    count = -(-columns // native)
    index = (torch.arange(count) * native // group).clamp(max=scales.shape[1] - 1)
    return scales[:, index] if count != scales.shape[1] else scales


def group_format(bits: int, native: int, asymmetric: bool) -> str:
    """Canonical name of the integer format."""
    return get_format(f"int{bits}-g{native}" + ("-asym" if asymmetric else "")).name
