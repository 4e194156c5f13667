# SPDX-License-Identifier: Apache-2.0
"""From a checkpoint's quantised matrix to one in the format that is wanted, a few rows at a time.

Plain numbers need none of this: the packer quantises them. Rows are independent in every format but
fp8, whose blocks have 128 of them; so a matrix is converted in runs of rows, and the float32 copies
that decoding needs stay small.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..errors import KernelError
from ..formats import Format
from ..quantize import QuantizedMatrix, quantize
from .checkpoint import Matrix

__all__ = ["SCRATCH", "common_scales", "in_format"]

SCRATCH = 16 << 20  # bytes that a conversion takes beside its input and result, about
_COPIES = 12  # float32 tensors alive at once, at most
_BLOCK = 128  # rows that fp8 scales share


def in_format(
    matrix: QuantizedMatrix,
    format: Format,
    search: bool = False,
    scale_dtype: torch.dtype | None = None,
) -> QuantizedMatrix:
    """As it is, if it is in that format already; else rounded to it.

    search       look for the scales with the least squared error
    scale_dtype  of the scales; None: the matrix' own, or quantize()'s default
    Raises KernelError if the scales would have to be rounded.
    """
    if matrix.format.name == format.name:
        if scale_dtype in (None, matrix.scales.dtype) or matrix.scales.dtype == torch.uint8:
            return matrix
        if scale_dtype != torch.float32:
            raise KernelError(
                f"scales: expected {scale_dtype} as in the layer's first expert, got "
                f"{matrix.scales.dtype}"
            )
        own = None if matrix.zeros is None else matrix.zeros.float()
        return QuantizedMatrix(format, matrix.codes, matrix.scales.float(), own)
    if _only_lacks_zeros(matrix.format, format):
        zeros = torch.full_like(matrix.scales, 8)
        same = QuantizedMatrix(format, matrix.codes, matrix.scales, zeros)
        return in_format(same, format, search, scale_dtype)
    rows, columns = matrix.codes.shape
    step = SCRATCH // (4 * _COPIES * max(columns, 1)) // _BLOCK * _BLOCK
    options: dict[str, Any] = {"search": search, "scale_dtype": scale_dtype}
    runs = [
        quantize(_numbers(matrix, begin, begin + max(step, _BLOCK)), format, **options)
        for begin in range(0, rows, max(step, _BLOCK))
    ]
    if len(runs) == 1:
        return runs[0]
    parts = [run.zeros for run in runs if run.zeros is not None]
    return QuantizedMatrix(
        format,
        torch.cat([run.codes for run in runs]),
        torch.cat([run.scales for run in runs]),
        torch.cat(parts) if parts else None,
    )


def _only_lacks_zeros(have: Format, want: Format) -> bool:
    """Whether `want` is the asymmetric variant of `have`: the same codes around a zero of 8."""
    same = (have.base, have.group_size) == (want.base, want.group_size) and have.base == "int4"
    return same and want.asymmetric and not have.asymmetric


def _numbers(matrix: QuantizedMatrix, begin: int, end: int) -> Tensor:
    zeros = None if matrix.zeros is None else matrix.zeros[begin:end]
    run = QuantizedMatrix(matrix.format, matrix.codes[begin:end], matrix.scales[begin:end], zeros)
    return run.dequantize(torch.float32)


def common_scales(matrices: Sequence[Matrix], format: Format) -> torch.dtype | None:
    """The dtype that holds the scales of all matrices that are in the format already.

    None if there is none, or if scales are bytes.
    """
    dtypes = {
        matrix.scales.dtype
        for matrix in matrices
        if isinstance(matrix, QuantizedMatrix) and matrix.format.name == format.name
    } - {torch.uint8}
    return None if not dtypes else dtypes.pop() if len(dtypes) == 1 else torch.float32
