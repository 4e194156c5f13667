# SPDX-License-Identifier: Apache-2.0
"""PackedLinear: a layer of quantised weights that is no expert, kept as few bits as its file has.

The weights lie in the block layout of csrc/blocks.h, the same on every device. A CPU multiplies
them with the kernels that experts run on (csrc/cpu/linear.h). Every other device makes the layer
plain for the time of a call: the weights keep their room, a call reads and writes more.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .errors import KernelError
from .formats import Format
from .native import _C
from .ops import _translated
from .packing import aligned_bytes, packed_bytes, scale_type_of
from .quantize import E2M1, SCALE_TYPES, QuantizedMatrix

__all__ = ["PackedLinear", "pack_matrix", "unpack_blob"]

_LANES, _SETS, _STEP = 32, 2, 128  # of csrc/blocks.h
_DTYPES = {name: dtype for dtype, name in SCALE_TYPES.items()}


@dataclass(frozen=True)
class _Packing:
    """How a blob is to be read: what csrc/blocks.h calls BlockShape, without k."""

    format: Format
    scale_type: str

    @property
    def code(self) -> int:
        f = self.format
        return int(_C.linear_packing(f.base, self.scale_type, f.group_size, f.asymmetric))


_PACKINGS: dict[tuple[int, int], _Packing] = {}  # what _C.linear_packing has made, and group sizes


class PackedLinear(nn.Module):
    """Like nn.Linear, without a weight that is a parameter: forward([..., in_features]).

    packed  uint8, the blob; a buffer, so that .to(device) takes it along and no dtype changes it
    bias    a parameter of the model's dtype, or None
    Sums are in float32 and rounded once. No gradient: backward raises.
    """

    packed: Tensor | None

    def __init__(self, in_features: int, out_features: int, bias: nn.Parameter | None) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.bias = bias
        self.register_buffer("packed", None, persistent=False)
        self.format, self._code, self._group = "", 0, 0

    def put(self, matrix: QuantizedMatrix, device: torch.device | str = "cpu") -> None:
        """Packs [out_features, in_features]. Raises KernelError for another shape."""
        shape = (self.out_features, self.in_features)
        if tuple(matrix.codes.shape) != shape:
            raise KernelError(f"expected {list(shape)}, got {list(matrix.codes.shape)}")
        blob, scale_type = pack_matrix(matrix)
        self.put_packed(blob.to(device), matrix.format, scale_type)

    def put_packed(self, blob: Tensor, format: Format, scale_type: str) -> None:
        """Uses what pack_matrix() made of [out_features, in_features], as it lies."""
        packing = _Packing(format, scale_type)
        self.format, self._code, self._group = format.name, packing.code, format.group_size
        _PACKINGS[self._code, self._group] = packing
        self.packed = blob

    def forward(self, input: Tensor) -> Tensor:
        if self.packed is None:
            raise KernelError("This layer holds no weights: loading the model did not finish.")
        rows = input.reshape(-1, self.in_features)
        try:
            out: Tensor = torch.ops.expertyard.linear(
                rows, self.packed, self.out_features, self._code, self._group
            )
        except RuntimeError as error:
            raise _translated(error) from None
        if self.bias is not None:
            out = out + self.bias
        return out.view(*input.shape[:-1], self.out_features)

    def dequantize(self, dtype: torch.dtype) -> Tensor:
        """The weights as plain numbers, [out_features, in_features]."""
        if self.packed is None:
            raise KernelError("This layer holds no weights: loading the model did not finish.")
        packing = _PACKINGS[self._code, self._group]
        return unpack_blob(self.packed, self.out_features, self.in_features, packing, dtype)

    def __getattr__(self, name: str) -> Any:
        if name == "weight":
            raise AttributeError(
                "this layer's weight is quantised and no parameter. What needs a parameter there "
                'can have one: load the model with dense="plain"'
            )
        return super().__getattr__(name)

    @property
    def device(self) -> torch.device:
        return torch.device("cpu") if self.packed is None else self.packed.device

    def kernel(self, dtype: torch.dtype) -> str:
        """What multiplies rows of that dtype: the name of a kernel, or "torch"."""
        if self.device.type != "cpu":
            return "torch"
        base = _PACKINGS[self._code, self._group].format.base
        return str(_C.kernel_name(base, str(dtype).removeprefix("torch."), "blocks", "exact"))

    @property
    def nbytes(self) -> int:
        return 0 if self.packed is None else self.packed.nbytes

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"bias={self.bias is not None}, {self.format or 'empty'}"
        )


def pack_matrix(matrix: QuantizedMatrix) -> tuple[Tensor, str]:
    """Quantised weights [rows, columns] as a w2 blob on the CPU, and the type of its scales."""
    (rows, columns), f, dtype = matrix.codes.shape, matrix.format, matrix.scales.dtype
    scale_dtype = None if dtype == torch.uint8 else dtype
    scale_type = scale_type_of(f, scale_dtype)
    blob = aligned_bytes(packed_bytes(f.name, rows, columns, scale_dtype)[1])
    parts = (matrix.codes, matrix.scales, matrix.zeros)
    kept = [None if t is None else t.cpu().contiguous() for t in parts]
    addresses = tuple(0 if t is None else t.data_ptr() for t in kept)
    _C.pack_blob(
        f.base, scale_type, f.group_size, f.asymmetric,
        rows=rows, k=columns, sources=[addresses], out=blob.data_ptr(),
    )  # fmt: skip
    return blob, scale_type


def unpack_blob(blob: Tensor, rows: int, cols: int, packing: Any, dtype: torch.dtype) -> Tensor:
    """The plain weights [rows, cols] of a w2 blob, computed where it lies."""
    f = packing.format
    per_step = {"bf16": 2, "int8": 4, "fp8": 4}.get(f.base, 8)  # k of a step
    in_line = 2 if f.base == "mxfp4" else 1  # groups that share a line
    group = f.group_size or _up(cols, per_step)
    line_k = group * in_line
    padded = _up(cols, line_k if in_line > 1 else per_step)
    lines, rest = divmod(padded, line_k)
    head = _head_bytes(f, packing.scale_type)
    whole = head + line_k // per_step * _STEP
    blocks = blob.view(-(-rows // _LANES), -1)
    body = blocks[:, : lines * whole].unflatten(1, (lines, whole)) if lines else None
    parts = [] if body is None else [_lines(body, f, packing.scale_type, group, in_line, dtype)]
    if rest:
        tail = blocks[:, lines * whole :].unsqueeze(1)
        parts.append(_lines(tail, f, packing.scale_type, group, in_line, dtype))
    return torch.cat(parts, dim=1)[:rows, :cols] if len(parts) > 1 else parts[0][:rows, :cols]


def _head_bytes(f: Format, scale_type: str) -> int:
    if f.base == "bf16":
        return 0
    return (_LANES * 4 if scale_type == "fp32" else 64) * (2 if f.asymmetric else 1)


def _lines(
    lines: Tensor, f: Format, scale_type: str, group: int, in_line: int, dtype: torch.dtype
) -> Tensor:
    """[blocks, lines, bytes] -> [32 * blocks, weights of the lines]."""
    blocks, count, _ = lines.shape
    head = _head_bytes(f, scale_type)
    steps = lines[..., head:].unflatten(-1, (-1, _SETS, _LANES // _SETS, 4))
    steps = steps.permute(0, 3, 4, 1, 2, 5)  # blocks, set, row, line, step, byte
    values = _numbers(steps, f.base, dtype)
    width = values.shape[-1] // count
    values = values.view(blocks * _LANES, count, width)
    if not head:
        return values.flatten(1)

    def of_groups(octets: Tensor) -> Tensor:  # [blocks, lines, bytes] -> [rows, lines, groups, 1]
        own = octets.contiguous().view(_DTYPES[scale_type])[..., : in_line * _LANES]
        own = own.unflatten(-1, (in_line, _LANES)).permute(0, 3, 1, 2)
        ordered: Tensor = own.reshape(blocks * _LANES, count, in_line, 1)
        return ordered

    size = head // (2 if f.asymmetric else 1)
    scales = of_groups(lines[..., :size])
    scales = torch.exp2(scales.to(dtype) - 127) if f.base == "mxfp4" else scales.to(dtype)
    grouped = values.unflatten(-1, (in_line, -1))
    if f.asymmetric:
        grouped = grouped - of_groups(lines[..., size:head]).to(dtype)
    elif f.base in ("int8", "int4"):
        grouped = grouped - {"int8": 128, "int4": 8}[f.base]
    weights: Tensor = (grouped * scales).flatten(1)
    return weights


def _numbers(steps: Tensor, base: str, dtype: torch.dtype) -> Tensor:
    """[..., line, step, 4 bytes] -> [..., weights]: what the codes are before any scale."""
    steps = steps.contiguous()
    if base == "bf16":
        return steps.view(torch.bfloat16).to(dtype).flatten(-3)
    if base == "fp8":
        return steps.view(torch.float8_e4m3fn).to(dtype).flatten(-3)
    if base == "int8":
        return steps.to(dtype).flatten(-3)
    nibbles = torch.stack((steps & 15, steps >> 4), dim=-2).flatten(-4)
    if base == "int4":
        return nibbles.to(dtype)
    table = torch.tensor([*E2M1, *(-v for v in E2M1)], dtype=dtype, device=steps.device)
    looked_up: Tensor = table[nibbles.long()]
    return looked_up


def _up(n: int, to: int) -> int:
    return math.ceil(n / to) * to


def plain_linear(
    input: Tensor, weight: Tensor, out_features: int, packing: int, group_size: int
) -> Tensor:
    """expertyard::linear where there is no kernel for it: the weights are made plain for a call."""
    known = _PACKINGS.get((packing, group_size))
    if known is None:
        raise KernelError(f"packing: {packing} with group_size {group_size} is not known here")
    return F.linear(input, unpack_blob(weight, out_features, input.shape[1], known, input.dtype))


torch.library.register_kernel("expertyard::linear", "cuda", plain_linear)


@torch.library.register_fake("expertyard::linear")
def _fake(
    input: Tensor, weight: Tensor, out_features: int, packing: int, group_size: int
) -> Tensor:
    return input.new_empty((input.shape[0], out_features))


@torch.library.custom_op("expertyard::no_linear_backward", mutates_args=())
def _no_backward(grad: Tensor, like: Tensor) -> Tensor:
    raise KernelError(
        "expertyard::linear has no gradient: quantised layers are for inference. To train, load "
        'the model with dense="plain"'
    )


@_no_backward.register_fake
def _no_backward_fake(grad: Tensor, like: Tensor) -> Tensor:
    return torch.empty_like(like)


def _remember(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(inputs[0])


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    return _no_backward(grad, *ctx.saved_tensors), None, None, None, None


torch.library.register_autograd("expertyard::linear", _backward, setup_context=_remember)
