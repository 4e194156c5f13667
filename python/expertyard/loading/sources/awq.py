# SPDX-License-Identifier: Apache-2.0
"""AWQ ("gemm" packing): w[o, i] = scales[i / group, o] * (code[i, o] - zero[i / group, o]).

qweight I32 [in, out / 8], qzeros I32 [groups, out / 8], scales [groups, out]. The nibbles of a
word, lowest first, are the columns 0, 2, 4, 6, 1, 3, 5, 7 of its eight.
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
from .gptq import group_size

__all__ = ["claim"]

_SUFFIX = ".qweight"
_PLACE = (0, 4, 1, 5, 2, 6, 3, 7)  # column of a word's eight -> its nibble


def claim(checkpoint: Checkpoint, settings: Mapping[str, Any]) -> dict[str, Stored]:
    version = str(settings.get("version", "gemm")).lower()
    bits = settings.get("bits", settings.get("w_bit", 4))
    if version != "gemm" or bits != 4:
        raise LoadError(
            f"config.json: quantization_config: AWQ in version {version!r} with {bits!r} bits is "
            "not read, only version 'gemm' with 4 bits."
        )
    return {
        f"{key.removesuffix(_SUFFIX)}.weight": _stored(
            checkpoint, key.removesuffix(_SUFFIX), settings
        )
        for key in checkpoint.keys
        if key.endswith(_SUFFIX)
    }


def _stored(checkpoint: Checkpoint, name: str, settings: Mapping[str, Any]) -> Stored:
    qweight, qzeros, scales = (f"{name}.{part}" for part in ("qweight", "qzeros", "scales"))
    shape = expect(checkpoint, qweight, ("I32",))
    if len(shape) != 2 or 0 in shape:
        raise LoadError(f"{checkpoint.where(qweight)}: expected [in, out / 8], got {list(shape)}.")
    columns, rows = shape[0], shape[1] * 8
    groups = (*expect(checkpoint, scales, KINDS), 0)[0]
    expect(checkpoint, scales, KINDS, (groups, rows))
    parts = [qweight, scales]
    if asymmetric := bool(settings.get("zero_point", True)):
        expect(checkpoint, qzeros, ("I32",), (groups, rows // 8))
        parts.append(qzeros)
    elif checkpoint.has(qzeros):
        parts.append(qzeros)
    claimed = settings.get("group_size", settings.get("q_group_size"))
    group = group_size(checkpoint, scales, groups, columns, claimed)
    native = native_group(group, columns)
    format = "int8-g32" if native is None else group_format(4, native, asymmetric)

    def read(expert: int | None) -> Matrix:
        codes = unpack_inputs(checkpoint.raw(qweight), awq=True)
        scale = checked_scales(checkpoint, scales).T
        zeros = _ordered(unpack(checkpoint.raw(qzeros), 4)).T if asymmetric else None
        if native is None:
            index = torch.arange(columns) // group
            zero = 8.0 if zeros is None else zeros[:, index].float()
            return scale[:, index].float() * (codes.float() - zero)
        return QuantizedMatrix(
            get_format(format),
            codes,
            spread(scale, group, native, columns).contiguous(),
            None if zeros is None else spread(zeros, group, native, columns).to(scale.dtype),
        )

    loss = "" if native is not None else f"groups of {group} have no native format"
    return Stored((rows, columns), format, tuple(parts), read, loss)


def _ordered(codes: torch.Tensor) -> torch.Tensor:
    ordered: torch.Tensor = codes.unflatten(-1, (-1, 8))[..., list(_PLACE)].flatten(-2)
    return ordered
