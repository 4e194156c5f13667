# SPDX-License-Identifier: Apache-2.0
"""float8 e4m3 weights with scales: w[r, c] = code[r, c] * scale[r / block rows, c / block columns].

DeepSeek-V3's own (`.weight` and `.weight_scale_inv`, 128 x 128), other names for the same
(`.weight_scale`, `.scale`, `.qscale_weight`), one scale a row or for the whole matrix. Scales are
numbers, or e8m0 bytes (2^(byte - 127)). Also fused weights [E, out, in] with `<name>_scale_inv`.
Blocks of other sizes are given in float32: no native format has them.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ...errors import LoadError
from ...formats import get_format
from ...quantize import QuantizedMatrix
from ..checkpoint import Checkpoint, Matrix, Stored
from .common import KINDS, checked_scales, expect

__all__ = ["claim"]

BLOCK = 128
_OF_WEIGHT = (".weight_scale_inv", ".weight_scale", ".scale", ".qscale_weight")
_OF_FUSED = ("_scale_inv", "_scale")
_E8M0 = ("U8", "F8_E8M0")


def claim(checkpoint: Checkpoint, settings: Mapping[str, Any]) -> dict[str, Stored]:
    """Every F8_E4M3 tensor with its scale. Raises LoadError for one that has none."""
    found: dict[str, Stored] = {}
    for key in checkpoint.keys:
        if checkpoint.kind(key) == "F8_E5M2":
            raise LoadError(f"{checkpoint.where(key)}: is float8 e5m2; only e4m3 weights are read.")
        if checkpoint.kind(key) == "F8_E4M3":
            found[key] = _stored(checkpoint, key, _scale_of(checkpoint, key), settings)
    return found


def _scale_of(checkpoint: Checkpoint, key: str) -> str:
    if key.endswith(".weight"):
        names = [key.removesuffix(".weight") + suffix for suffix in _OF_WEIGHT]
    else:
        names = [key + suffix for suffix in _OF_FUSED]
    for name in names:
        if checkpoint.has(name):
            return name
    raise LoadError(
        f"{checkpoint.where(key)}: is float8, but its scale is missing: expected one of "
        f"{', '.join(names)}. Download the missing files again."
    )


def _stored(checkpoint: Checkpoint, key: str, scale: str, settings: Mapping[str, Any]) -> Stored:
    shape = checkpoint.shape(key)
    if len(shape) not in (2, 3) or 0 in shape:
        raise LoadError(
            f"{checkpoint.where(key)}: expected [out, in] or [experts, out, in], got {list(shape)}."
        )
    blocks = expect(checkpoint, scale, (*KINDS, *_E8M0))
    rows, columns = shape[-2:]
    block = _block(checkpoint, key, scale, blocks, shape, settings)
    format = {(1, columns): "fp8-channel", (BLOCK, BLOCK): "fp8"}.get(block, "bf16")

    def read(expert: int | None) -> Matrix:
        codes = checkpoint.raw(key).view(torch.uint8)
        scales = _scales(checkpoint, scale, expert if len(blocks) == len(shape) else None)
        if len(shape) == 3 and expert is not None:
            codes = codes[expert]
        if format == "fp8-channel":
            return QuantizedMatrix(get_format(format), codes, scales.reshape(-1, 1).expand(rows, 1))
        by_row = scales.repeat_interleave(block[0], 0)[:rows]
        if format == "fp8":
            return QuantizedMatrix(get_format(format), codes, by_row)
        wide = by_row.repeat_interleave(block[1], 1)[:, :columns]
        return codes.view(torch.float8_e4m3fn).float() * wide

    loss = "" if format != "bf16" else f"blocks of {block[0]} x {block[1]} have no native format"
    return Stored(shape, format, (key, scale), read, loss)


def _scales(checkpoint: Checkpoint, key: str, expert: int | None) -> Tensor:
    if checkpoint.kind(key) not in _E8M0:
        return checked_scales(checkpoint, key, expert).float()
    exponents = checkpoint.raw(key).view(torch.uint8)
    exponents = exponents if expert is None else exponents[expert]
    if bool((exponents == 255).any()):
        raise LoadError(f"{checkpoint.where(key)}: holds NaN scales. The file is corrupt.")
    return torch.exp2(exponents.float() - 127)


def _block(
    checkpoint: Checkpoint,
    key: str,
    scale: str,
    blocks: tuple[int, ...],
    shape: tuple[int, ...],
    settings: Mapping[str, Any],
) -> tuple[int, int]:
    """Rows and columns that share a scale, told by the scale's shape."""
    rows, columns = shape[-2:]
    size = settings.get("weight_block_size")
    if size is None and (blocks == shape[:-2] or blocks in ((1,), (1, 1))):
        return 1, columns  # one scale for the whole matrix: the same in every row
    own = blocks[len(shape) - 2 :]
    if size is None and own in ((rows,), (rows, 1)):
        return 1, columns
    size = size or (BLOCK, BLOCK)
    try:
        height, width = int(size[0]), int(size[1])
    except (TypeError, ValueError, LookupError, OverflowError):
        height = width = 0
    if height < 1 or width < 1:
        raise LoadError(
            "config.json: quantization_config: weight_block_size: expected two whole numbers, got "
            f"{size!r}."
        )
    expected = (*shape[:-2], -(-rows // height), -(-columns // width))
    if blocks != expected:
        raise LoadError(
            f"{checkpoint.where(scale)}: expected shape {list(expected)} for {key!r} "
            f"{list(shape)} in blocks of {height} x {width}, got {list(blocks)}."
        )
    return height, width
