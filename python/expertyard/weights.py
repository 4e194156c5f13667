# SPDX-License-Identifier: Apache-2.0
"""PackedExperts: the experts of one layer on one device, where they lie.

Nothing is copied here. The tensors may be a model's own parameters, views into a mapped file, or
blobs that ExpertPacker has made; a native handle stands for a table of pointers into them, one row
an expert.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor

from .errors import KernelError
from .formats import Format
from .modes import MODES, has_fast
from .native import _C
from .reference import ACTIVATIONS, SWIGLU_OAI_ALPHA, SWIGLU_OAI_LIMIT, has_gate, split_gate_up

FORMAT_OF_DTYPE = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}


Expert: TypeAlias = tuple[Tensor | None, ...]  # see PackedExperts.expert()


@dataclass(frozen=True)
class Blobs:
    """Packed experts (csrc/blocks.h): per expert one blob of gate and up, one of down; None: not
    here.

    w13, w2      uint8, contiguous, 64-byte aligned, of packing.packed_bytes()
    scale_type   "none" (bf16), "bf16", "fp16", "fp32" or "e8m0" (mxfp4)
    """

    format: Format
    scale_type: str
    hidden_size: int
    intermediate_size: int
    w13: Sequence[Tensor | None]
    w2: Sequence[Tensor | None]


class PackedExperts:
    """Experts that a kernel can reach. Make it with from_tensors or from_experts (weights in
    place), or with ExpertPacker (packed).

    handle             int, what the op takes; valid while this object lives
    format             "bf16", "fp16", "fp32", "int8", "int4-g32", "fp8", "mxfp4" ...
    layout             "rows" (in place) or "blocks" (packed)
    mode               "exact" or "fast": what kernels do with activations (modes.py)
    device             torch.device of the weights, and so of the computation
    num_experts, hidden_size, intermediate_size
    nbytes             bytes of weights and biases that are here
    """

    handle: int
    format: str
    layout: str
    mode: str
    device: torch.device
    num_experts: int
    hidden_size: int
    intermediate_size: int
    activation: str
    alpha: float
    limit: float
    _matrices: tuple[list[Tensor | None], list[Tensor | None], list[Tensor | None]]
    _biases: list[list[Tensor | None]]
    _native: dict[str, Any]

    def __init__(self) -> None:
        raise TypeError("make PackedExperts with from_tensors, from_experts or ExpertPacker")

    @classmethod
    def _of_rows(
        cls,
        gate: Sequence[Tensor | None] | None,
        up: Sequence[Tensor | None],
        down: Sequence[Tensor | None],
        biases: Sequence[Sequence[Tensor | None]],
        activation: str,
        alpha: float,
        limit: float,
    ) -> "PackedExperts":
        self = object.__new__(cls)
        self._set_activation(activation, alpha, limit)
        if (gate is not None) != has_gate(activation):
            raise KernelError(
                f"gate: activation {activation!r} "
                + ("needs one, got None" if gate is None else "has none, expected None")
            )
        self._matrices = _matching_matrices(up if gate is None else gate, up, down)
        if gate is None:  # one matrix in the places of both, as in the blobs of w13
            self._matrices = (self._matrices[0], self._matrices[0], self._matrices[2])
        first = next(g for g in self._matrices[0] if g is not None)
        first_down = next(d for d in self._matrices[2] if d is not None)
        self.num_experts = len(up)
        self.intermediate_size, self.hidden_size = first.shape
        self.format, self.layout, self.mode = FORMAT_OF_DTYPE[first.dtype], "rows", "exact"
        self.device = first.device
        self._native = {
            "format": self.format,
            "gate_up_row_stride": first.stride(0) * first.element_size(),
            "down_row_stride": first_down.stride(0) * first_down.element_size(),
        }
        self._set_biases(biases)
        self.handle = self._register()
        return self

    @classmethod
    def from_blobs(
        cls,
        blobs: Blobs,
        *,
        gate_bias: Sequence[Tensor | None] | None = None,
        up_bias: Sequence[Tensor | None] | None = None,
        down_bias: Sequence[Tensor | None] | None = None,
        activation: str = "silu",
        alpha: float = SWIGLU_OAI_ALPHA,
        limit: float = SWIGLU_OAI_LIMIT,
        mode: str = "exact",
    ) -> "PackedExperts":
        """Packed experts where they lie: an arena, or a mapped file of packed weights.

        mode   "exact": activations stay what they are; "fast": quantised to 8 bits in groups of
               128, to integers on a CPU (int8, int4, mxfp4), to e4m3 on a GPU (fp8)
        Raises KernelError if blobs do not have the size, alignment and device that they should.
        """
        self = object.__new__(cls)
        self._set_activation(activation, alpha, limit)
        self.num_experts = len(blobs.w13)
        self.hidden_size, self.intermediate_size = blobs.hidden_size, blobs.intermediate_size
        self.format, self.layout, self.mode = blobs.format.name, "blocks", mode
        if mode not in MODES:
            raise KernelError(f"mode: expected one of {', '.join(MODES)}, got {mode!r}")
        first = next((w for w in blobs.w13 if w is not None), None)
        here = "cpu" if first is None else first.device.type
        if mode == "fast" and not _may_be_fast(blobs.format.name, here):
            raise KernelError(
                "mode 'fast' needs int8, int4 or mxfp4 weights, or fp8 on a GPU, got "
                f"{blobs.format.name} on {here}: leave mode out"
            )
        self._native = {
            "format": blobs.format.base,
            "gate_up_row_stride": 0,
            "down_row_stride": 0,
            "layout": "blocks",
            "mode": mode,
            "scale_type": blobs.scale_type,
            "group_size": 0 if blobs.format.base == "bf16" else blobs.format.group_size,
            "zeros": blobs.format.asymmetric,
        }
        w13, w2, self.device = _matching_blobs(blobs, has_gate(activation))
        self._matrices = (w13, w13, w2)
        none: list[Tensor | None] = [None] * self.num_experts
        self._set_biases((gate_bias or none, up_bias or none, down_bias or none))
        self.handle = self._register()
        return self

    def _set_activation(self, activation: str, alpha: float, limit: float) -> None:
        if activation not in ACTIVATIONS:
            raise _unknown(activation)
        finite = math.isfinite(limit) or activation != "softcap_silu"
        if not (limit > 0 and finite and math.isfinite(alpha) and alpha != 0):
            raise KernelError(
                f"alpha and limit of {activation}: expected numbers other than 0, limit positive"
                f"{'' if activation == 'softcap_silu' else ' or infinite'}, got {alpha}, {limit}"
            )
        self.activation, self.alpha, self.limit = activation, float(alpha), float(limit)

    def _set_biases(self, biases: Sequence[Sequence[Tensor | None]]) -> None:
        self._biases = [
            _matching_biases(name, bias, size, self)
            for name, bias, size in (
                ("gate bias", biases[0], self.intermediate_size),
                ("up bias", biases[1], self.intermediate_size),
                ("down bias", biases[2], self.hidden_size),
            )
        ]

    @classmethod
    def from_tensors(
        cls,
        gate_up: Tensor,
        down: Tensor,
        *,
        gate_up_bias: Tensor | None = None,
        down_bias: Tensor | None = None,
        activation: str = "silu",
        interleaved: bool = False,
        alpha: float = SWIGLU_OAI_ALPHA,
        limit: float = SWIGLU_OAI_LIMIT,
    ) -> "PackedExperts":
        """Experts stacked along dimension 0, as Hugging Face has them.

        gate_up       [num_experts, 2 * intermediate_size, hidden_size] bf16, fp16 or fp32: gate
                      rows, then up rows; interleaved=True: gate, up, gate, up ...
        down          [num_experts, hidden_size, intermediate_size], same dtype and device
        gate_up_bias  [num_experts, 2 * intermediate_size], rows in the same order; any float dtype
        Without a gate (activation "relu2"), gate_up is up alone, [num_experts, intermediate_size,
        hidden_size], and so is its bias.
        down_bias     [num_experts, hidden_size]
        The last dimension must be contiguous; other strides are free, so views work.
        Raises KernelError on anything else. Weights are used in place; biases are kept as fp32.
        """
        for name, t, dims in (("gate_up", gate_up, 3), ("down", down, 3)):
            if t.dim() != dims:
                raise KernelError(
                    f"{name}: expected [num_experts, rows, columns], got {list(t.shape)}"
                )
        num_experts, rows, hidden_size = gate_up.shape
        if activation not in ACTIVATIONS:
            raise _unknown(activation)
        halves = 2 if has_gate(activation) else 1
        if rows % halves or down.shape != (num_experts, hidden_size, rows // halves):
            raise KernelError(
                f"gate_up and down: expected [num_experts, {'2 * ' if halves == 2 else ''}"
                "intermediate_size, hidden_size] and [num_experts, hidden_size, intermediate_size],"
                f" got {list(gate_up.shape)} and {list(down.shape)}"
            )
        none: list[Tensor | None] = [None] * num_experts

        def parts(rows: Tensor) -> tuple[list[Tensor | None] | None, list[Tensor | None]]:
            if halves == 1:
                return None, list(rows)
            gate, up = split_gate_up(rows, interleaved)
            return list(gate), list(up)

        gate, up = parts(gate_up)
        gate_bias, up_bias, down_biases = none, none, none
        if gate_up_bias is not None:
            if gate_up_bias.shape != (num_experts, rows):
                raise KernelError(
                    f"gate_up_bias: expected [{num_experts}, {rows}], "
                    f"got {list(gate_up_bias.shape)}"
                )
            first, up_bias = parts(gate_up_bias)
            gate_bias = first or none
        if down_bias is not None:
            if down_bias.shape != (num_experts, hidden_size):
                raise KernelError(
                    f"down_bias: expected [{num_experts}, {hidden_size}], "
                    f"got {list(down_bias.shape)}"
                )
            down_biases = list(down_bias)
        return cls._of_rows(
            gate, up, list(down), (gate_bias, up_bias, down_biases),
            activation, alpha, limit,
        )  # fmt: skip

    @classmethod
    def from_experts(
        cls,
        gate: Sequence[Tensor | None] | None,
        up: Sequence[Tensor | None],
        down: Sequence[Tensor | None],
        *,
        gate_bias: Sequence[Tensor | None] | None = None,
        up_bias: Sequence[Tensor | None] | None = None,
        down_bias: Sequence[Tensor | None] | None = None,
        activation: str = "silu",
        alpha: float = SWIGLU_OAI_ALPHA,
        limit: float = SWIGLU_OAI_LIMIT,
    ) -> "PackedExperts":
        """Experts one by one: gate, up [intermediate_size, hidden_size], down [hidden_size,
        intermediate_size], biases [intermediate_size] and [hidden_size].

        None: this expert is not here, and its share of the sum is left out. gate is None where the
        activation has none. All experts have one dtype, device and row stride. Raises KernelError
        on anything else.
        """
        none: list[Tensor | None] = [None] * len(up)
        return cls._of_rows(
            gate, up, down, (gate_bias or none, up_bias or none, down_bias or none),
            activation, alpha, limit,
        )  # fmt: skip

    @property
    def scale_type(self) -> str:
        """Of packed weights, as in Blobs; "none" for weights in place."""
        return str(self._native.get("scale_type", "none"))

    @property
    def nbytes(self) -> int:
        two = self.layout == "blocks" or not has_gate(self.activation)  # gate and up are one
        matrices = self._matrices[1:] if two else self._matrices
        tensors = [t for group in (*matrices, *self._biases) for t in group if t is not None]
        return sum(t.numel() * t.element_size() for t in tensors)

    def kernel_name(
        self, num_tokens: int = 1, hidden_dtype: torch.dtype = torch.bfloat16, top_k: int = 8
    ) -> str:
        """The kernel that would serve such a call now. KernelError if none does.

        num_tokens, top_k  the choice depends on them on a CUDA device only
        """
        dtype = str(hidden_dtype).removeprefix("torch.")
        try:
            if self.device.type == "cuda":
                return str(_C.cuda_kernel_name(self.handle, dtype, num_tokens, top_k))
            base = self._native["format"]
            return str(_C.kernel_name(base, dtype, self.layout, self.mode))
        except ValueError as error:
            raise KernelError(str(error)) from None

    @property
    def last_kernel(self) -> str | None:
        """The kernel that served the last call, None before the first: what really ran."""
        name = _C.experts_info(self.handle)["last_kernel"]
        return None if name is None else str(name)

    @property
    def calls(self) -> int:
        """How many calls our kernels have served with these experts."""
        return int(_C.experts_info(self.handle)["calls"])

    def check(self) -> None:
        """Raises KernelError if an earlier call met an id that names no expert.

        On the CPU such a call raises by itself. A GPU is still working when the call returns, so
        there the token's row becomes NaN, and the next call with these experts raises, or this.
        To be sure of the answer, call torch.cuda.synchronize() first.
        """
        try:
            _C.check_experts(self.handle)
        except ValueError as error:
            raise KernelError(str(error)) from None

    def here(self) -> tuple[int, ...]:
        """Ids of the experts that are here."""
        return tuple(e for e, w in enumerate(self._matrices[0]) if w is not None)

    def expert(self, expert: int) -> Expert | None:
        """The tensors of one expert, where they lie: (gate, up, down, gate bias, up bias, down
        bias); without a gate up twice, packed the blob w13 twice, then w2. None: it is not here."""
        groups = (*self._matrices, *self._biases)
        return None if groups[0][expert] is None else tuple(group[expert] for group in groups)

    def expert_bytes(self, expert: int) -> int:
        """Bytes of one expert's tensors; 0 if it is not here."""
        found = {id(t): t for t in self.expert(expert) or () if t is not None}
        return sum(t.numel() * t.element_size() for t in found.values())

    def row_strides(self) -> tuple[int, int, int] | None:
        """Values between two rows of gate, up and down; None: packed."""
        if self.layout != "rows":
            return None
        size = next(w for w in self._matrices[0] if w is not None).element_size()
        inner, outer = self._native["gate_up_row_stride"], self._native["down_row_stride"]
        return inner // size, inner // size, outer // size

    def holding(self, experts: Mapping[int, Expert]) -> "PackedExperts":
        """The same kind of experts, but these only; elsewhere, if that is where their tensors are.

        experts  at least one; all with equal row strides and on one device. They are used in place.
        """
        other = object.__new__(PackedExperts)
        other.__dict__.update({k: v for k, v in self.__dict__.items() if k != "handle"})
        columns: list[list[Tensor | None]] = [[None] * self.num_experts for _ in range(6)]
        for expert, tensors in experts.items():
            for column, tensor in zip(columns, tensors, strict=True):
                column[expert] = tensor
        other._matrices, other._biases = (columns[0], columns[1], columns[2]), columns[3:]
        first = next(iter(experts.values()))
        assert first[0] is not None and first[2] is not None
        other.device = first[0].device
        if self.mode == "fast" and not _may_be_fast(self.format, other.device.type):
            other.mode, other._native = "exact", {**self._native, "mode": "exact"}
        if self.layout == "rows":
            size = first[0].element_size()
            other._native = {
                **self._native,
                "gate_up_row_stride": first[0].stride(0) * size,
                "down_row_stride": first[2].stride(0) * size,
            }
        other.handle = other._register()
        return other

    def in_mode(self, mode: str) -> "PackedExperts":
        """The same packed experts in "exact" or "fast"; KernelError if the latter is not there."""
        if mode == self.mode:
            return self
        if mode not in MODES or not _may_be_fast(self.format, self.device.type):
            raise KernelError(f"mode {mode!r}: {self.format} on {self.device.type} has none")
        other = object.__new__(PackedExperts)
        other.__dict__.update({k: v for k, v in self.__dict__.items() if k != "handle"})
        other.mode, other._native = mode, {**self._native, "mode": mode}
        other.handle = other._register()
        return other

    def write(self, expert: int, tensors: Expert | None) -> None:
        """An expert comes (used in place; row strides as the others'), or goes (None).

        One row of pointers is written, so it is quick. No call on these experts may be running.
        """
        row = tensors or (None,) * 6
        pointers = tuple(0 if t is None else t.data_ptr() for t in row)
        _C.write_expert(self.handle, expert, pointers)
        for column, tensor in zip((*self._matrices, *self._biases), row, strict=True):
            column[expert] = tensor

    def _register(self) -> int:
        groups = (*self._matrices, *self._biases)
        pointers = [
            tuple(0 if t is None else t.data_ptr() for t in expert)
            for expert in zip(*groups, strict=True)
        ]
        if self.device.type == "cuda":
            # biases were converted on torch's stream; the kernels may run on another one
            torch.cuda.current_stream(self.device).synchronize()
        try:
            handle = _C.add_experts(
                activation=self.activation,
                alpha=self.alpha,
                limit=self.limit,
                hidden_size=self.hidden_size,
                intermediate_size=self.intermediate_size,
                pointers=pointers,
                device=self.device.index if self.device.type == "cuda" else -1,
                **self._native,
            )
        except ValueError as error:
            raise KernelError(str(error)) from None
        return int(handle)

    def __del__(self) -> None:
        if (handle := self.__dict__.pop("handle", None)) is not None:
            _C.remove_experts(handle)

    def __deepcopy__(self, memo: dict[int, Any]) -> "PackedExperts":
        """Shares the weights, which nothing here changes, under a handle of its own."""
        copy = object.__new__(PackedExperts)
        memo[id(self)] = copy
        copy.__dict__.update({k: v for k, v in self.__dict__.items() if k != "handle"})
        gate, up, down = self._matrices
        copy._matrices = list(gate), list(up), list(down)
        copy._biases = [list(column) for column in self._biases]
        copy.handle = copy._register()
        return copy

    def __reduce__(self) -> Any:
        raise KernelError(
            "PackedExperts cannot be pickled: they are pointers into this process's memory. "
            "Save the model with save_pretrained and load it again."
        )

    def __repr__(self) -> str:
        return (
            f"PackedExperts({self.num_experts} x [{self.intermediate_size}, {self.hidden_size}] "
            f"{self.format}{'' if self.mode == 'exact' else ' ' + self.mode}, {self.activation}, "
            f"{self.device})"
        )


def _may_be_fast(format: str, device: str) -> bool:
    """On a GPU also what is fast on CPUs only: experts move, and are exact while they are there."""
    return has_fast(format) or has_fast(format, device)


def _matching_matrices(
    gate: Sequence[Tensor | None], up: Sequence[Tensor | None], down: Sequence[Tensor | None]
) -> tuple[list[Tensor | None], list[Tensor | None], list[Tensor | None]]:
    if not len(gate) == len(up) == len(down) or len(gate) == 0:
        raise KernelError(
            "gate, up, down: expected one matrix an expert each, "
            f"got {len(gate)}, {len(up)}, {len(down)}"
        )
    first: Tensor | None = next((g for g in gate if g is not None), None)
    if first is None:
        raise KernelError("gate: every expert is None; at least one must be here")
    if first.dim() != 2 or first.dtype not in FORMAT_OF_DTYPE:
        known = ", ".join(str(d).removeprefix("torch.") for d in FORMAT_OF_DTYPE)
        raise KernelError(
            f"gate: expected [intermediate_size, hidden_size] in {known}, "
            f"got {list(first.shape)} {first.dtype}"
        )
    intermediate_size, hidden_size = first.shape
    if intermediate_size == 0 or hidden_size == 0:
        raise KernelError(f"gate: expected no empty dimension, got {list(first.shape)}")
    for name, matrices, shape in (
        ("gate", gate, (intermediate_size, hidden_size)),
        ("up", up, (intermediate_size, hidden_size)),
        ("down", down, (hidden_size, intermediate_size)),
    ):
        stride: int | None = None
        for expert, (here, w) in enumerate(zip(gate, matrices, strict=True)):
            if (here is None) != (w is None):
                raise KernelError(f"{name}[{expert}]: gate, up and down are not all here or absent")
            if w is None:
                continue
            stride = w.stride(0) if stride is None else stride
            if name == "up":
                stride = first.stride(0)
            problem = (
                f"expected {list(shape)} {first.dtype} on {first.device}"
                if (tuple(w.shape), w.dtype, w.device) != (shape, first.dtype, first.device)
                else "expected contiguous rows"
                if w.stride(1) != 1 and w.shape[1] > 1
                else f"expected rows {stride} values apart, as in the other experts"
                if w.stride(0) != stride
                else None
            )
            if problem:
                raise KernelError(
                    f"{name}[{expert}]: {problem}, got {list(w.shape)} {w.dtype} on {w.device}, "
                    f"strides {list(w.stride())}"
                )
    if first.device.type == "cuda":
        if problem := _C.cuda_problem(first.device.index):
            raise KernelError(f"gate: {first.device}: {problem}")
    elif first.device.type != "cpu":
        raise KernelError(f"gate: expected a tensor on cpu or cuda, got one on {first.device}")
    detached = [[None if w is None else w.detach() for w in group] for group in (gate, up, down)]
    return detached[0], detached[1], detached[2]


def _matching_blobs(
    blobs: Blobs,
    gated: bool,
) -> tuple[list[Tensor | None], list[Tensor | None], torch.device]:
    sizes = _C.blob_bytes(
        blobs.format.base,
        blobs.scale_type,
        0 if blobs.format.base == "bf16" else blobs.format.group_size,
        blobs.format.asymmetric,
        blobs.hidden_size,
        blobs.intermediate_size,
        gated,
    )
    first = next((w for w in blobs.w13 if w is not None), None)
    if first is None or len(blobs.w13) != len(blobs.w2):
        raise KernelError(
            f"blobs: expected at least one expert, w13 and w2 of each, got {len(blobs.w13)} and "
            f"{len(blobs.w2)}"
        )
    for expert, pair in enumerate(zip(blobs.w13, blobs.w2, strict=True)):
        if (pair[0] is None) != (pair[1] is None):
            raise KernelError(f"w13, w2 [{expert}]: not both here or both absent")
        for name, blob, size in zip(("w13", "w2"), pair, sizes, strict=True):
            if blob is not None and (
                blob.dtype != torch.uint8
                or tuple(blob.shape) != (size,)
                or not blob.is_contiguous()
                or blob.data_ptr() % 64
                or blob.device != first.device
            ):
                raise KernelError(
                    f"{name}[{expert}]: expected uint8 [{size}], contiguous, 64-byte aligned, on "
                    f"{first.device}, got {list(blob.shape)} {blob.dtype} on {blob.device} at "
                    f"{blob.data_ptr():#x}"
                )
    if first.device.type == "cuda":
        if problem := _C.cuda_problem(first.device.index):
            raise KernelError(f"w13: {first.device}: {problem}")
    elif first.device.type != "cpu":
        raise KernelError(f"w13: expected a tensor on cpu or cuda, got one on {first.device}")
    return list(blobs.w13), list(blobs.w2), first.device


def _matching_biases(
    name: str, biases: Sequence[Tensor | None], size: int, experts: PackedExperts
) -> list[Tensor | None]:
    """fp32 contiguous copies: biases are small, and one type serves every kernel."""
    if len(biases) != experts.num_experts:
        raise KernelError(f"{name}: expected {experts.num_experts} entries, got {len(biases)}")
    out: list[Tensor | None] = []
    for expert, bias in enumerate(biases):
        if bias is None:
            out.append(None)
            continue
        if tuple(bias.shape) != (size,) or bias.device != experts.device:
            raise KernelError(
                f"{name}[{expert}]: expected [{size}] on {experts.device}, "
                f"got {list(bias.shape)} on {bias.device}"
            )
        out.append(bias.detach().to(torch.float32).contiguous())
    return out


def _unknown(activation: str) -> KernelError:
    return KernelError(f"activation: expected one of {', '.join(ACTIVATIONS)}, got {activation!r}")
