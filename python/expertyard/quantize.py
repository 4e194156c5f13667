# SPDX-License-Identifier: Apache-2.0
"""Weights as codes and scales: what readers of checkpoints hand to the packer, and how plain
weights become it, one matrix at a time; no layout (that is csrc/blocks.h).

quantize() is native code for what lies in RAM (csrc/quantize.h). quantize_in_torch() says the same
in torch, and serves every other device and dtype.
"""

from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor

from .errors import KernelError
from .formats import Format
from .native import _C

__all__ = [
    "E2M1",
    "BlockMatrix",
    "Plain",
    "QuantizedMatrix",
    "native_rows",
    "native_source",
    "quantize",
    "quantize_in_torch",
]

# Values of the 4-bit float e2m1 by code: sign << 3 | magnitude.
E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
_E2M1_BOUNDS = (0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0)  # halfway between neighbours

# code of the value zero, and the largest magnitude that a plain scale maps the largest weight to
_CENTRE = {"int8": 128, "int4": 8}
_LARGEST = {"int8": 127.0, "int4": 7.0, "fp8": 448.0}

_SEARCH = tuple(1.0 - step / 64 for step in range(29))  # shares of the plain scale that are tried


SCALE_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
# what _C calls the types of stored scales
SCALE_TYPES = {
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.float32: "fp32",
    torch.uint8: "e8m0",
}


@dataclass(frozen=True)
class QuantizedMatrix:
    """One [rows, cols] weight matrix ([out, in], as in torch.nn.Linear) in a native format.

    codes   uint8 [rows, cols], one code a byte
              int8    w = scale * (code - 128)
              int4    w = scale * (code - zero), code 0 .. 15; zero = 8 where zeros is None
              fp8     w = scale * e4m3(code)
              mxfp4   w = scale * e2m1(code), code = sign << 3 | index into E2M1
    scales  [rows, groups], group = format.group_size columns (0: one group, the whole row)
              bf16, fp16 or fp32, kept as they are; mxfp4: uint8 e8m0, scale = 2^(byte - 127)
    zeros   [rows, groups] in scales' dtype for asymmetric int4, else None; may be fractions
    Raises KernelError if shapes or dtypes are not so, or a scale is not finite.
    """

    format: Format
    codes: Tensor
    scales: Tensor
    zeros: Tensor | None = None

    def __post_init__(self) -> None:
        if self.codes.dim() != 2 or self.codes.dtype != torch.uint8:
            raise KernelError(
                f"codes: expected [rows, cols] uint8, got {list(self.codes.shape)} "
                f"{self.codes.dtype}"
            )
        expected = (self.codes.shape[0], self.num_groups)
        known = (torch.uint8,) if self.format.base == "mxfp4" else SCALE_DTYPES
        for name, tensor in (("scales", self.scales), ("zeros", self.zeros)):
            if tensor is None:
                continue
            if tuple(tensor.shape) != expected or tensor.dtype not in known:
                raise KernelError(
                    f"{name}: expected {list(expected)} in "
                    f"{' or '.join(str(d).removeprefix('torch.') for d in known)} for "
                    f"{self.format.name} codes {list(self.codes.shape)}, got "
                    f"{list(tensor.shape)} {tensor.dtype}"
                )
            if tensor.dtype == torch.uint8:
                bad = bool((tensor == 255).any())
            else:
                bad = not bool(torch.isfinite(tensor).all())
            if bad:
                raise KernelError(f"{name}: expected finite numbers, got NaN or infinity")
        if self.format.asymmetric != (self.zeros is not None):
            there = "no zeros" if self.zeros is None else "zeros"
            raise KernelError(f"zeros: format {self.format.name} with {there}")
        if self.zeros is not None and self.zeros.dtype != self.scales.dtype:
            raise KernelError(f"zeros: expected {self.scales.dtype}, got {self.zeros.dtype}")

    @property
    def num_groups(self) -> int:
        return _num_groups(self.format, self.codes.shape[1])

    def dequantize(self, dtype: torch.dtype = torch.float64) -> Tensor:
        """The weights as plain numbers, [rows, cols] in dtype."""
        base = self.format.base
        if base == "mxfp4":
            scales = torch.exp2(self.scales.to(dtype) - 127)
        else:
            scales = self.scales.to(dtype)
        if base == "fp8":
            values = self.codes.view(torch.float8_e4m3fn).to(dtype)
        elif base == "mxfp4":
            table = torch.tensor([*E2M1, *(-v for v in E2M1)], dtype=dtype)
            values = table.to(self.codes.device)[self.codes.long()]
        else:
            values = self.codes.to(dtype)
            zeros = self.zeros
            if zeros is None:
                values = values - _CENTRE[base]
            else:
                values = values - self._spread(zeros.to(dtype))
        return values * self._spread(scales)

    def _spread(self, of_groups: Tensor) -> Tensor:
        cols = self.codes.shape[1]
        group = self.format.group_size or cols
        return of_groups.repeat_interleave(group, dim=1)[:, :cols]


@dataclass(frozen=True)
class BlockMatrix:
    """One [rows, cols] weight matrix in GGUF blocks that no native format holds: plain numbers for
    who reads it. Native code quantises it without ever having all of them in memory.

    kind     "q5_1", "q5_k" or "q6_k", in RAM
    blocks   uint8 [rows, blocks of a row, bytes], the last two contiguous
    weights  of a block
    """

    kind: str
    blocks: Tensor
    weights: int

    @property
    def shape(self) -> tuple[int, int]:
        return self.blocks.shape[0], self.blocks.shape[1] * self.weights

    def __getitem__(self, rows: slice) -> "BlockMatrix":
        return BlockMatrix(self.kind, self.blocks[rows], self.weights)

    def float(self) -> Tensor:
        """The weights, [rows, cols] float32, in new memory."""
        blocks, out = self.blocks.contiguous(), torch.empty(self.shape)
        count = blocks.shape[0] * blocks.shape[1]
        _C.decode_ggml(self.kind, blocks.data_ptr(), count, out.data_ptr())
        return out


Plain: TypeAlias = Tensor | BlockMatrix


def quantize(
    weight: Plain,
    format: Format,
    *,
    search: bool = False,
    scale_dtype: torch.dtype | None = None,
) -> QuantizedMatrix:
    """Plain weights [rows, cols] (any float dtype) -> codes and scales of `format`.

    Plain rounding: the largest magnitude of a group gets the largest code (asymmetric: the least
    and the greatest weight get codes 0 and 15). search=True tries smaller scales too and keeps, for
    each group, the one with the least squared error.
    scale_dtype   of the stored scales; codes are rounded with the scale as it is stored. Default:
                  bfloat16 for groups of int8 and int4, float32 for whole rows and fp8
    Raises KernelError for a weight that is not finite.
    """
    scale_dtype = _checked(weight, format, scale_dtype)
    readable = native_rows(weight)
    if readable is None:
        assert isinstance(weight, Tensor)
        return quantize_in_torch(weight, format, search=search, scale_dtype=scale_dtype)
    rows, cols = weight.shape
    shape = (rows, _num_groups(format, cols))
    codes = torch.empty((rows, cols), dtype=torch.uint8)
    scales = torch.empty(shape, dtype=torch.uint8 if format.base == "mxfp4" else scale_dtype)
    zeros = torch.empty(shape, dtype=scale_dtype) if format.asymmetric else None
    try:
        _C.quantize_rows(
            format.base,
            SCALE_TYPES[scales.dtype],
            format.group_size,
            format.asymmetric,
            search,
            rows,
            cols,
            native_source(readable),
            (codes.data_ptr(), scales.data_ptr(), 0 if zeros is None else zeros.data_ptr()),
        )
    except ValueError as error:
        raise KernelError(str(error)) from None
    return QuantizedMatrix(format, codes, scales, zeros)


def native_rows(weight: Plain) -> Plain | None:
    """The matrix with contiguous rows (a copy only if they are not), or None if native code cannot
    read its dtype or its device."""
    if isinstance(weight, BlockMatrix):
        return weight
    weight = weight.detach()
    if weight.device.type != "cpu" or weight.dtype not in SCALE_DTYPES:
        return None
    return weight if weight.stride(1) == 1 else weight.contiguous()


def native_source(rows: Plain) -> tuple[int, str, int]:
    """Address, dtype or kind of blocks, and bytes between rows, as _C wants them."""
    if isinstance(rows, BlockMatrix):
        return rows.blocks.data_ptr(), rows.kind, rows.blocks.stride(0)
    dtype = str(rows.dtype).removeprefix("torch.")
    return rows.data_ptr(), dtype, rows.stride(0) * rows.element_size()


def _checked(weight: Plain, format: Format, scale_dtype: torch.dtype | None) -> torch.dtype:
    """The dtype of the scales. Raises KernelError."""
    if isinstance(weight, Tensor) and (
        weight.dim() != 2 or not weight.is_floating_point() or 0 in weight.shape
    ):
        raise KernelError(
            f"weight: expected [rows, cols] of floats, got {list(weight.shape)} {weight.dtype}"
        )
    if format.base not in ("int8", "int4", "fp8", "mxfp4"):
        raise KernelError(f"format {format.name} is not a quantised one")
    if scale_dtype is None:
        grouped = format.base in _CENTRE and format.group_size > 0
        return torch.bfloat16 if grouped else torch.float32
    if scale_dtype not in SCALE_DTYPES:
        raise KernelError(f"scale_dtype: expected one of {SCALE_DTYPES}, got {scale_dtype}")
    return scale_dtype


def quantize_in_torch(
    weight: Tensor,
    format: Format,
    *,
    search: bool = False,
    scale_dtype: torch.dtype | None = None,
) -> QuantizedMatrix:
    """As quantize(), on the weight's device. Plain rounding gives the same bits; in a search, two
    scales whose errors differ in the last bit may be chosen the other way round."""
    scale_dtype = _checked(weight, format, scale_dtype)
    rows, cols = weight.shape
    groups = _num_groups(format, cols)
    size = format.group_size or cols
    w = weight.detach().float()
    if not bool(torch.isfinite(w).all()):
        raise KernelError("weight: expected finite numbers, got NaN or infinity")
    if groups * size != cols:
        w = torch.nn.functional.pad(w, (0, groups * size - cols))
    w = w.view(rows, groups, size)
    best: tuple[Tensor, Tensor, Tensor | None] | None = None
    best_error: Tensor | None = None
    for share in _SEARCH if search else (1.0,):
        if format.base == "mxfp4" and share not in (1.0, 0.5):
            continue  # scales are powers of two
        candidate = _round(w, format, share, scale_dtype)
        if not search:
            best = candidate
            break
        error = (_values(candidate, format) - w).square().sum(-1, keepdim=True)
        if best is None or best_error is None:
            best, best_error = candidate, error
            continue
        better = error < best_error
        zeros = candidate[2]
        best = (
            torch.where(better, candidate[0], best[0]),
            torch.where(better, candidate[1], best[1]),
            None if zeros is None or best[2] is None else torch.where(better, zeros, best[2]),
        )
        best_error = torch.where(better, error, best_error)
    assert best is not None
    codes, scales, found_zeros = best
    return QuantizedMatrix(
        format,
        codes.view(rows, groups * size)[:, :cols].contiguous(),
        scales.view(rows, groups),
        None if found_zeros is None else found_zeros.view(rows, groups),
    )


def _num_groups(format: Format, cols: int) -> int:
    return -(-cols // format.group_size) if format.group_size else 1


_Rounded = tuple[Tensor, Tensor, Tensor | None]


def _round(w: Tensor, format: Format, share: float, scale_dtype: torch.dtype) -> _Rounded:
    """codes uint8 like w [rows, groups, size]; scales and zeros [rows, groups, 1]."""
    if format.base == "mxfp4":
        return _round_mxfp4(w, share)
    if format.base == "fp8" and format.group_size:
        largest = _over_blocks(w.abs().amax(-1, keepdim=True), format.group_size)
    else:
        largest = w.abs().amax(-1, keepdim=True)
    if format.asymmetric:
        low = w.amin(-1, keepdim=True).clamp(max=0) * share
        high = w.amax(-1, keepdim=True).clamp(min=0) * share
        scales = _stored((high - low) / 15, scale_dtype)
        step = scales.float()
        inverse = _inverse(step)
        zeros = (-low * inverse).round().clamp(0, 15) + 0.0  # never -0
        zeros = zeros.to(scale_dtype)
        codes = (w * inverse + zeros.float()).round().clamp(0, 15)
        return codes.to(torch.uint8), scales, zeros
    scales = _stored(largest * (share / _LARGEST[format.base]), scale_dtype)
    step = scales.float()
    scaled = w * _inverse(step)
    if format.base == "fp8":
        return scaled.clamp(-448, 448).to(torch.float8_e4m3fn).view(torch.uint8), scales, None
    centre = _CENTRE[format.base]
    least = -8 if format.base == "int4" else -127
    codes = scaled.round().clamp(least, centre - 1) + centre
    return codes.to(torch.uint8), scales, None


def _inverse(step: Tensor) -> Tensor:
    """1 / step; 0 for a step of 0 and for those so small that they have none."""
    inverse = 1 / step
    return torch.where((step > 0) & torch.isfinite(inverse), inverse, 0)


def _stored(scales: Tensor, dtype: torch.dtype) -> Tensor:
    """Scales in the dtype that they are kept in; one that is too small for it is zero."""
    return scales.to(dtype)


def _over_blocks(largest: Tensor, block: int) -> Tensor:
    """The largest magnitude over `block` rows, for each of these rows."""
    rows = largest.shape[0]
    parts = [part.amax(0, keepdim=True).expand(part.shape) for part in largest.split(block)]
    return torch.cat(parts) if rows else largest


def _round_mxfp4(w: Tensor, share: float) -> _Rounded:
    """Scale 2^(floor(log2(largest)) - 2), as the OCP microscaling specification has it."""
    largest = w.abs().amax(-1, keepdim=True)
    exponent = torch.frexp(largest).exponent - 1  # floor(log2), exactly
    exponent = exponent - 2 + (0 if share == 1.0 else 1)
    biased = torch.where(largest > 0, exponent + 127, 0).clamp(0, 254)
    scaled = torch.ldexp(w, 127 - biased)
    bounds = torch.tensor(_E2M1_BOUNDS, device=w.device)
    index = torch.bucketize(scaled.abs(), bounds)
    codes = index + torch.where(scaled < 0, 8, 0)
    return codes.to(torch.uint8), biased.to(torch.uint8), None


def _values(rounded: _Rounded, format: Format) -> Tensor:
    codes, scales, zeros = rounded
    rows, groups, size = codes.shape
    matrix = QuantizedMatrix(
        format,
        codes.view(rows, groups * size),
        scales.view(rows, groups),
        None if zeros is None else zeros.view(rows, groups),
    )
    return matrix.dequantize(torch.float32).view(rows, groups, size)
