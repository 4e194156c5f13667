# SPDX-License-Identifier: Apache-2.0
"""ExpertPacker: the experts of one layer, one by one, into the block layout of csrc/blocks.h.

One arena for all of them, so that an expert costs two blobs and nothing else; the peak is the arena
and the expert that is being packed.
"""

from typing import Any

import torch
from torch import Tensor

from .errors import KernelError
from .formats import Format, get_format
from .native import _C
from .quantize import SCALE_TYPES, Plain, QuantizedMatrix, native_rows, native_source, quantize
from .reference import SWIGLU_OAI_ALPHA, SWIGLU_OAI_LIMIT, has_gate
from .weights import Blobs, PackedExperts

__all__ = ["ExpertPacker", "packed_bytes", "scale_type_of"]

_ALIGNMENT = 64
_HUGE_PAGE = 2 << 20


def scale_type_of(format: Format, scale_dtype: torch.dtype | None = None) -> str:
    """What _C calls the type of a format's stored scales; default as in quantize()."""
    if format.base == "bf16":
        return "none"
    if format.base == "mxfp4":
        return "e8m0"
    if scale_dtype is None:
        grouped = format.base in ("int8", "int4") and format.group_size > 0
        scale_dtype = torch.bfloat16 if grouped else torch.float32
    if scale_dtype not in SCALE_TYPES or scale_dtype == torch.uint8:
        raise KernelError(f"scale_dtype: expected bfloat16, float16 or float32, got {scale_dtype}")
    return SCALE_TYPES[scale_dtype]


def packed_bytes(
    format: str,
    hidden_size: int,
    intermediate_size: int,
    scale_dtype: torch.dtype | None = None,
    activation: str = "silu",
) -> tuple[int, int]:
    """Bytes of one packed expert's two blobs, (w13, w2). The activation says if there is a gate."""
    f = _packable(format)
    w13, w2 = _C.blob_bytes(
        f.base,
        scale_type_of(f, scale_dtype),
        f.group_size,
        f.asymmetric,
        hidden_size,
        intermediate_size,
        has_gate(activation),
    )
    return int(w13), int(w2)


class ExpertPacker:
    """Packs the experts of one layer; put() each, then finish().

    format       any but fp32 and fp16: "bf16", "int8", "int4-g32", "fp8", "mxfp4" ...
    scale_dtype  of stored scales (default: quantize()'s); QuantizedMatrix values must have it
    mode         of the CPU kernels: "exact" keeps activations as they are, "fast" quantises them to
                 8 bits (integer formats and mxfp4)
    arena        uint8 [>= num_experts * (w13 + w2 bytes)], 64-byte aligned, to pack into; else one
                 is allocated on `device`
    search       quantise plain weights with quantize(search=True)
    put() may be called from several threads at once for different experts. Raises KernelError.
    """

    def __init__(
        self,
        num_experts: int,
        hidden_size: int,
        intermediate_size: int,
        format: str,
        *,
        device: str | torch.device = "cpu",
        activation: str = "silu",
        alpha: float = SWIGLU_OAI_ALPHA,
        limit: float = SWIGLU_OAI_LIMIT,
        scale_dtype: torch.dtype | None = None,
        has_bias: bool = False,
        mode: str = "exact",
        arena: Tensor | None = None,
        search: bool = False,
    ) -> None:
        self.format = _packable(format)
        self.num_experts = num_experts
        self.hidden_size, self.intermediate_size = hidden_size, intermediate_size
        self.device = torch.device(device)
        self.search = search
        self._scale_dtype = scale_dtype
        self._scale_type = scale_type_of(self.format, scale_dtype)
        self._has_bias = has_bias
        self._keywords: dict[str, Any] = {
            "activation": activation,
            "alpha": alpha,
            "limit": limit,
            "mode": mode,
        }
        self.blob_bytes = packed_bytes(
            format, hidden_size, intermediate_size, scale_dtype, activation
        )
        needed = num_experts * sum(self.blob_bytes)
        if arena is None:
            arena = expert_arena(num_experts, self.blob_bytes, self.device)
        elif (
            arena.dtype != torch.uint8
            or arena.dim() != 1
            or arena.numel() < needed
            or arena.data_ptr() % _ALIGNMENT
            or arena.device != self.device
        ):
            raise KernelError(
                f"arena: expected uint8 [>= {needed}] on {self.device}, aligned to {_ALIGNMENT} "
                f"bytes, got {list(arena.shape)} {arena.dtype} on {arena.device} at "
                f"{arena.data_ptr():#x}"
            )
        self._arena = arena
        self._experts: dict[int, tuple[Tensor, Tensor]] = {}
        self._biases: dict[int, tuple[Tensor | None, Tensor | None, Tensor | None]] = {}

    def blobs(self, expert: int) -> tuple[Tensor, Tensor]:
        """Where an expert's w13 and w2 lie in the arena."""
        w13, w2 = self.blob_bytes
        start = expert * (w13 + w2)
        return self._arena[start : start + w13], self._arena[start + w13 : start + w13 + w2]

    def put(
        self,
        expert: int,
        gate: Plain | QuantizedMatrix | None,
        up: Plain | QuantizedMatrix,
        down: Plain | QuantizedMatrix,
        *,
        gate_bias: Tensor | None = None,
        up_bias: Tensor | None = None,
        down_bias: Tensor | None = None,
    ) -> None:
        """Packs one expert: gate, up [intermediate_size, hidden_size], down [hidden_size,
        intermediate_size]; plain weights are quantised here. gate is None where the activation has
        none. Raises KernelError."""
        if not 0 <= expert < self.num_experts:
            raise KernelError(f"expert: expected 0 to {self.num_experts - 1}, got {expert}")
        inner = (self.intermediate_size, self.hidden_size)
        w13, w2 = self.blobs(expert)
        here = self.device.type == "cpu"
        parts = (w13, w2) if here else (aligned_bytes(w13.numel()), aligned_bytes(w2.numel()))
        gated = has_gate(self._keywords["activation"])
        if (gate is not None) != gated:
            raise KernelError(
                f"gate[{expert}]: activation {self._keywords['activation']!r} "
                + ("needs one, got None" if gated else "has none, expected None")
            )
        first = {} if gate is None else {f"gate[{expert}]": gate}
        self._write({**first, f"up[{expert}]": up}, inner, parts[0])
        self._write({f"down[{expert}]": down}, inner[::-1], parts[1])
        if not here:
            w13.copy_(parts[0])
            w2.copy_(parts[1])
        self._experts[expert] = (w13, w2)
        self._biases[expert] = (gate_bias, up_bias, down_bias)

    def finish(self) -> PackedExperts:
        """The packed experts; those that were never put are not here. KernelError if none was."""
        experts = range(self.num_experts)
        biases = [self._biases.get(e, (None, None, None)) for e in experts]
        return PackedExperts.from_blobs(
            Blobs(
                self.format,
                self._scale_type,
                self.hidden_size,
                self.intermediate_size,
                [self._experts[e][0] if e in self._experts else None for e in experts],
                [self._experts[e][1] if e in self._experts else None for e in experts],
            ),
            gate_bias=[b[0] for b in biases],
            up_bias=[b[1] for b in biases],
            down_bias=[b[2] for b in biases],
            **self._keywords,
        )

    def _write(
        self, matrices: dict[str, Plain | QuantizedMatrix], shape: tuple[int, int], out: Tensor
    ) -> None:
        """One blob. Plain weights in RAM are quantised and laid out in one go."""
        for name, matrix in matrices.items():
            given = matrix.codes if isinstance(matrix, QuantizedMatrix) else matrix
            if tuple(given.shape) != shape:
                raise KernelError(f"{name}: expected {list(shape)}, got {list(given.shape)}")
        where: dict[str, Any] = {"rows": shape[0], "k": shape[1], "out": out.data_ptr()}
        packing = (
            self.format.base,
            self._scale_type,
            self.format.group_size,
            self.format.asymmetric,
        )
        plain = [native_rows(m) for m in matrices.values() if not isinstance(m, QuantizedMatrix)]
        rows = [m for m in plain if m is not None]
        if self.format.base != "bf16" and len(rows) == len(matrices):
            try:
                sources = [native_source(m) for m in rows]
                _C.quantize_blob(*packing, self.search, sources=sources, **where)
            except ValueError as error:
                raise KernelError(f"{', '.join(matrices)}: {error}") from None
            return
        parts = [self._codes(name, matrix) for name, matrix in matrices.items()]
        addresses = [tuple(0 if t is None else t.data_ptr() for t in part) for part in parts]
        _C.pack_blob(*packing, sources=addresses, **where)

    def _codes(
        self, name: str, matrix: Plain | QuantizedMatrix
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        if self.format.base == "bf16":
            if isinstance(matrix, QuantizedMatrix):
                raise KernelError(f"{name}: expected plain weights, got {matrix.format.name} codes")
            numbers = matrix.detach() if isinstance(matrix, Tensor) else matrix.float()
            return numbers.to("cpu", torch.bfloat16).contiguous(), None, None
        if not isinstance(matrix, QuantizedMatrix):
            matrix = quantize(
                matrix, self.format, search=self.search, scale_dtype=self._scale_dtype
            )
        if matrix.format.name != self.format.name:
            raise KernelError(
                f"{name}: expected codes of {self.format.name}, got {matrix.format.name}"
            )
        if SCALE_TYPES[matrix.scales.dtype] != self._scale_type:
            raise KernelError(
                f"{name}: expected scales in {self._scale_type}, got {matrix.scales.dtype}; say "
                "scale_dtype= when you make the packer"
            )
        tensors = (matrix.codes, matrix.scales, matrix.zeros)
        codes, scales, zeros = (None if t is None else t.cpu().contiguous() for t in tensors)
        assert codes is not None
        return codes, scales, zeros


def expert_arena(
    num_experts: int, blob_bytes: tuple[int, int], device: torch.device | str = "cpu"
) -> Tensor:
    """Memory for the blobs of a layer: uint8 [num_experts * (w13 + w2 bytes)], uninitialised. On a
    machine of several NUMA nodes, each has its part of every blob (csrc/cpu/nodes.h)."""
    count = num_experts * sum(blob_bytes)
    nodes = int(_C.num_nodes()) if torch.device(device).type == "cpu" else 1
    # a huge page lies on one node: where it would hold the parts of several, small ones are better
    huge = nodes == 1 or min(blob_bytes) >= 2 * nodes * _HUGE_PAGE
    arena = aligned_bytes(count, device, huge_pages=huge)
    if nodes > 1:
        _C.place_blobs(arena.data_ptr(), blob_bytes, num_experts)
    return arena


def aligned_bytes(
    count: int, device: torch.device | str = "cpu", huge_pages: bool = True
) -> Tensor:
    """Uninitialised uint8 [count] that begins at a multiple of 64 bytes (of a huge page, if large
    enough to have one)."""
    large = count >= 2 * _HUGE_PAGE and torch.device(device).type == "cpu"
    alignment = _HUGE_PAGE if large else _ALIGNMENT
    raw = torch.empty(count + alignment, dtype=torch.uint8, device=device)
    start = -raw.data_ptr() % alignment
    aligned = raw[start : start + count]
    if large and huge_pages:
        _C.advise_huge_pages(aligned.data_ptr(), count // alignment * alignment)
    return aligned


def _packable(name: str) -> Format:
    found = get_format(name)
    if found.base in ("fp32", "fp16"):
        raise KernelError(
            f"format {name!r} is used in place, not packed; take bf16 or a smaller one"
        )
    return found
