# SPDX-License-Identifier: Apache-2.0
"""GPTQ: w[o, i] = scales[i / group, o] * (code[i, o] - zero[i / group, o]).

qweight I32 [in * bits / 32, out], qzeros I32 [groups, out * bits / 32], scales [groups, out], g_idx
I32 [in]; a word's lowest bits come first. The first version of the format stores zero - 1
(checkpoint_format "gptq", the default), the second stores zero ("gptq_v2").
With act-order (desc_act) g_idx scatters a group's columns; such a weight is given in float32.
"""

from collections.abc import Mapping
from typing import Any

import torch

from ...errors import LoadError
from ...formats import get_format
from ...quantize import QuantizedMatrix
from ..checkpoint import Checkpoint, Matrix, Stored
from .common import (
    KINDS,
    checked_scales,
    expect,
    group_format,
    native_group,
    spread,
    unpack,
    unpack_inputs,
)

__all__ = ["claim", "looks_like"]

_SUFFIX = ".qweight"


def looks_like(checkpoint: Checkpoint) -> bool:
    """Whether qweight lies as GPTQ's does and not as AWQ's: packed along the inputs."""
    key = next(key for key in checkpoint.keys if key.endswith(_SUFFIX))
    name = key.removesuffix(_SUFFIX)
    if checkpoint.has(f"{name}.g_idx"):
        return True
    scales = f"{name}.scales"
    return checkpoint.has(scales) and checkpoint.shape(scales)[-1:] == checkpoint.shape(key)[-1:]


def claim(checkpoint: Checkpoint, settings: Mapping[str, Any]) -> dict[str, Stored]:
    return {
        f"{key.removesuffix(_SUFFIX)}.weight": _stored(
            checkpoint, key.removesuffix(_SUFFIX), settings
        )
        for key in checkpoint.keys
        if key.endswith(_SUFFIX)
    }


def _stored(checkpoint: Checkpoint, name: str, settings: Mapping[str, Any]) -> Stored:
    qweight, qzeros, scales = (f"{name}.{part}" for part in ("qweight", "qzeros", "scales"))
    order = f"{name}.g_idx"
    bits = settings.get("bits", 4)
    if bits not in (4, 8):
        raise LoadError(
            f"config.json: quantization_config: GPTQ with {bits!r} bits is not read, only 4 and 8."
        )
    words, rows = _two(checkpoint, qweight, expect(checkpoint, qweight, ("I32",)))
    columns = words * 32 // bits
    groups, _ = _two(checkpoint, scales, expect(checkpoint, scales, KINDS))
    expect(checkpoint, scales, KINDS, (groups, rows))
    expect(checkpoint, qzeros, ("I32",), (groups, rows * bits // 32))
    group = group_size(checkpoint, scales, groups, columns, settings.get("group_size"))
    parts = [qweight, qzeros, scales]
    scattered = False
    if checkpoint.has(order):
        expect(checkpoint, order, ("I32", "I64"), (columns,))
        parts.append(order)
        scattered = bool(settings.get("desc_act"))
    half = 1 << (bits - 1)
    symmetric = bool(settings.get("sym", True))
    native = native_group(group, columns)
    exact = native is not None and not scattered and (bits == 4 or symmetric)
    added = 0 if settings.get("checkpoint_format", "gptq") == "gptq_v2" else 1

    def read(expert: int | None) -> Matrix:
        words = checkpoint.raw(qweight)
        codes = unpack_inputs(words, awq=False) if bits == 4 else unpack(words.T, bits)
        scale = checked_scales(checkpoint, scales).T
        zeros = unpack(checkpoint.raw(qzeros), bits).T.to(torch.int32) + added
        groups_of = checkpoint.raw(order).long() if order in parts else None
        regular = torch.arange(columns) // group
        if groups_of is not None and not scattered and not torch.equal(groups_of, regular):
            raise LoadError(
                f"{checkpoint.where(order)}: is not in order, though config.json says that "
                "desc_act is off. The file does not belong to this config.json."
            )
        if not exact or native is None:
            index = regular if groups_of is None else groups_of
            if bool(((index < 0) | (index >= groups)).any()):
                raise LoadError(f"{checkpoint.where(order)}: names a group that is not there.")
            wide = codes.float().sub_(zeros.float().contiguous().index_select(1, index))
            return wide.mul_(scale.float().contiguous().index_select(1, index))
        if symmetric and not bool((zeros == half).all()):
            raise LoadError(
                f"{checkpoint.where(qzeros)}: expected {half} everywhere, since config.json says "
                "that the quantisation is symmetric (sym)."
            )
        return QuantizedMatrix(
            get_format(group_format(bits, native, not symmetric)),
            codes,
            spread(scale, group, native, columns).contiguous(),
            None if symmetric else spread(zeros, group, native, columns).to(scale.dtype),
        )

    if exact and native is not None:
        format, loss = group_format(bits, native, not symmetric), ""
    elif scattered:
        format, loss = "int8-g32", "act-order (desc_act) scatters the columns of a group"
    else:
        format, loss = "int8-g32", f"{bits}-bit groups of {group} have no native format"
    return Stored((rows, columns), format, tuple(parts), read, loss)


def _two(checkpoint: Checkpoint, key: str, shape: tuple[int, ...]) -> tuple[int, int]:
    if len(shape) != 2 or 0 in shape:
        raise LoadError(f"{checkpoint.where(key)}: expected two dimensions, got {list(shape)}.")
    return shape[0], shape[1]


def group_size(checkpoint: Checkpoint, key: str, groups: int, columns: int, claimed: Any) -> int:
    """Columns that share a scale. LoadError if the file and config.json do not agree."""
    group = columns if claimed in (-1, None) and groups == 1 else claimed
    if group is None:
        group = columns // groups
    if not isinstance(group, int) or group < 1 or -(-columns // group) != groups:
        raise LoadError(
            f"{checkpoint.where(key)}: {groups} groups for {columns} columns do not fit "
            f"group_size {claimed!r} of config.json."
        )
    return group
