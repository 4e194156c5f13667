# SPDX-License-Identifier: Apache-2.0
"""compressed-tensors: `pack-quantized` (Kimi-K2's int4), `int-quantized`, `float-quantized` (fp8)
and `mxfp4-pack-quantized`.

pack-quantized: weight_packed I32 [out, in * bits / 32], code = value + 2^(bits - 1), lowest bits
first; weight_scale [out, groups]; weight_zero_point I32 [out * bits / 32, groups], packed along the
rows; weight_shape [2]. A layer may have settings of its own: shapes decide, not config groups.
"""

from collections.abc import Mapping
from typing import Any

import torch

from ...errors import LoadError
from ...formats import get_format
from ...quantize import QuantizedMatrix
from ..checkpoint import Checkpoint, Matrix, Stored
from . import fp8_blocks
from .common import KINDS, checked_scales, expect, group_format, native_group, spread, unpack
from .mxfp4 import checked_exponents, nibbles

__all__ = ["claim"]

_PACKED = ".weight_packed"


def claim(checkpoint: Checkpoint, settings: Mapping[str, Any]) -> dict[str, Stored]:
    found: dict[str, Stored] = {}
    for key in checkpoint.keys:
        if key.endswith(_PACKED):
            name = key.removesuffix(_PACKED)
            if checkpoint.kind(key) == "U8":
                found[f"{name}.weight"] = _mxfp4(checkpoint, name)
            else:
                found[f"{name}.weight"] = _packed(checkpoint, name, settings)
        elif checkpoint.kind(key) == "I8" and key.endswith(".weight"):
            found[key] = _int8(checkpoint, key)
    return found | fp8_blocks.claim(checkpoint, _block_settings(settings))


def _weights(settings: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The `weights` part of every config group."""
    groups = settings.get("config_groups")
    groups = groups.values() if isinstance(groups, Mapping) else []
    weights = [group.get("weights") for group in groups if isinstance(group, Mapping)]
    return [each for each in weights if isinstance(each, Mapping)]


def _bits(settings: Mapping[str, Any]) -> int:
    found = [each.get("num_bits", 4) for each in _weights(settings)] or [4]
    if any(bits != found[0] for bits in found) or found[0] not in (4, 8):
        raise LoadError(
            "config.json: quantization_config: expected groups of 4 or of 8 bits, got "
            f"{', '.join(map(repr, found))}."
        )
    return int(found[0])


def _block_settings(settings: Mapping[str, Any]) -> dict[str, Any]:
    for each in _weights(settings):
        if each.get("block_structure"):
            return {"weight_block_size": each["block_structure"]}
    return {}


def _group(
    checkpoint: Checkpoint, key: str, settings: Mapping[str, Any], groups: int, columns: int
) -> int:
    """Columns that share a scale. LoadError if config.json has none that fits the scales."""
    if groups == 1:
        return columns
    claimed = [each.get("group_size") for each in _weights(settings)]
    claimed = [group for group in claimed if group not in (None, -1)]
    if not claimed:
        claimed = [columns // groups if groups and columns % groups == 0 else None]
    for group in claimed:
        if isinstance(group, int) and group > 0 and -(-columns // group) == groups:
            return group
    raise LoadError(
        f"{checkpoint.where(key)}: {groups} groups for {columns} columns do not fit group_size "
        f"{', '.join(map(repr, claimed))} of config.json."
    )


def _packed(checkpoint: Checkpoint, name: str, settings: Mapping[str, Any]) -> Stored:
    bits = _bits(settings)
    packed, scales, zeros = (
        f"{name}.{part}" for part in ("weight_packed", "weight_scale", "weight_zero_point")
    )
    shape = expect(checkpoint, packed, ("I32",))
    if len(shape) != 2 or 0 in shape:
        raise LoadError(f"{checkpoint.where(packed)}: expected two dimensions, got {list(shape)}.")
    rows, columns = shape[0], shape[1] * 32 // bits
    parts = [packed, scales]
    if checkpoint.has(f"{name}.weight_shape"):
        parts.append(f"{name}.weight_shape")
        rows, columns = _true_shape(checkpoint, name, rows, columns, bits)
    if checkpoint.has(f"{name}.weight_g_idx"):
        parts.append(f"{name}.weight_g_idx")
    scattered = checkpoint.has(f"{name}.weight_g_idx")
    found = (*expect(checkpoint, scales, KINDS), 1)
    expect(checkpoint, scales, KINDS, (rows, found[1]) if len(found) == 3 else (rows,))
    groups = found[1]
    group = _group(checkpoint, scales, settings, groups, columns)
    if asymmetric := checkpoint.has(zeros):
        expect(checkpoint, zeros, ("I32",), (-(-rows * bits // 32), groups))
        parts.append(zeros)
    native = None if scattered else native_group(group, columns)
    exact = native is not None and (bits == 4 or not asymmetric)
    format = group_format(bits, native, asymmetric) if exact and native else "int8-g32"
    half = 1 << (bits - 1)

    def read(expert: int | None) -> Matrix:
        codes = unpack(checkpoint.raw(packed), bits)[:, :columns]
        scale = checked_scales(checkpoint, scales).reshape(rows, groups)
        zero = None
        if asymmetric:  # stored with the codes' offset
            zero = unpack(checkpoint.raw(zeros).T, bits)[:, :rows].T
        if exact and native is not None:
            return QuantizedMatrix(
                get_format(format),
                codes,
                spread(scale, group, native, columns),
                None if zero is None else spread(zero, group, native, columns).to(scale.dtype),
            )
        index = torch.arange(columns) // group
        if scattered:
            index = checkpoint.raw(f"{name}.weight_g_idx").long()
            if index.shape != (columns,) or bool(((index < 0) | (index >= groups)).any()):
                where = checkpoint.where(f"{name}.weight_g_idx")
                raise LoadError(f"{where}: names a group that is not there.")
        offset = float(half) if zero is None else zero[:, index].float()
        return scale[:, index].float() * (codes.float() - offset)

    loss = ""
    if scattered:
        loss = "act-order (weight_g_idx) scatters the columns of a group"
    elif not exact:
        loss = f"{bits}-bit groups of {group} have no native format"
    return Stored((rows, columns), format, tuple(parts), read, loss)


def _true_shape(
    checkpoint: Checkpoint, name: str, rows: int, columns: int, bits: int
) -> tuple[int, int]:
    """weight_shape, which tells padding of the last word from weights: read here, 16 bytes."""
    key = f"{name}.weight_shape"
    expect(checkpoint, key, ("I64", "I32"), (2,))
    out, inner = (int(size) for size in checkpoint.raw(key))
    if out != rows or not columns - 32 // bits < inner <= columns:
        raise LoadError(
            f"{checkpoint.where(key)}: says [{out}, {inner}], but weight_packed holds "
            f"[{rows}, {columns}]."
        )
    return out, inner


def _int8(checkpoint: Checkpoint, key: str) -> Stored:
    scales = key.removesuffix(".weight") + ".weight_scale"
    shape = expect(checkpoint, key, ("I8",))
    if len(shape) != 2 or 0 in shape:
        raise LoadError(f"{checkpoint.where(key)}: expected [out, in], got {list(shape)}.")
    rows, columns = shape
    found = expect(checkpoint, scales, KINDS)
    if found not in ((rows, 1), (rows,), (1,), ()):
        groups = found[1] if len(found) == 2 and found[0] == rows else 0
        group = columns // groups if groups and columns % groups == 0 else 0
        native = native_group(group, columns) if group else None
        if native is None:
            raise LoadError(
                f"{checkpoint.where(scales)}: expected a scale a row, or one for each 32, 64 or "
                f"128 columns of {list(shape)}, got {list(found)}."
            )
    else:
        group, native = columns, None
    format = "int8" if native is None else group_format(8, native, False)

    def read(expert: int | None) -> Matrix:
        codes = checkpoint.raw(key).view(torch.uint8) ^ 128  # two's complement -> value + 128
        scale = checked_scales(checkpoint, scales)
        if native is None:
            scale = scale.reshape(-1, 1).expand(rows, 1)
        else:
            scale = spread(scale, group, native, columns)
        return QuantizedMatrix(get_format(format), codes, scale)

    return Stored(shape, format, (key, scales), read)


def _mxfp4(checkpoint: Checkpoint, name: str) -> Stored:
    packed, scales = f"{name}.weight_packed", f"{name}.weight_scale"
    shape = expect(checkpoint, packed, ("U8",))
    if len(shape) != 2 or 0 in shape:
        raise LoadError(f"{checkpoint.where(packed)}: expected two dimensions, got {list(shape)}.")
    rows, columns = shape[0], shape[1] * 2
    if checkpoint.has(f"{name}.weight_global_scale") or checkpoint.has(f"{name}.weight_scale_2"):
        raise LoadError(
            f"{checkpoint.where(packed)}: is NVFP4 (groups of 16 with a global scale), which "
            "Expertyard does not read."
        )
    expect(checkpoint, scales, ("U8", "F8_E8M0"), (rows, -(-columns // 32)))

    def read(expert: int | None) -> Matrix:
        exponents = checkpoint.raw(scales).view(torch.uint8)
        return QuantizedMatrix(
            get_format("mxfp4"),
            nibbles(checkpoint.raw(packed)),
            checked_exponents(checkpoint, scales, exponents),
        )

    return Stored((rows, columns), "mxfp4", (packed, scales), read)
