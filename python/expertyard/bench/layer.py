# SPDX-License-Identifier: Apache-2.0
"""The weights of one measured layer, in every format, without waiting minutes for them.

One expert is drawn and quantised, the template; expert e is the template with its rows moved on by
whole blocks, a different way for each e. So no two experts compute the same, a packed expert is
made by copying blocks, and what any of them should give follows from the template alone.
Nothing here is timed. A kernel cannot tell such weights from others: it reads each expert's own.
"""

from dataclasses import dataclass, field, replace
from functools import cache
from typing import Any

import torch
from torch import Tensor

from ..formats import get_format
from ..packing import ExpertPacker, expert_arena, packed_bytes, scale_type_of
from ..quantize import QuantizedMatrix, quantize
from ..reference import apply_activation
from ..weights import Blobs, PackedExperts
from .shapes import Shape

W13_BLOCK, W2_BLOCK = 16, 32  # rows of gate and up, and of down, that are packed together
_DRAWN = 4 << 20  # values of a matrix that are drawn, about; a larger one repeats its rows


@dataclass(frozen=True)
class Expert:
    """gate, up [intermediate_size, hidden_size] and down [hidden_size, intermediate_size]."""

    gate: Tensor
    up: Tensor
    down: Tensor

    def matrices(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.gate, self.up, self.down


@dataclass(frozen=True)
class Call:
    """hidden_states [T, hidden_size] bf16, topk_ids [T, top_k] int64, topk_weights like it, bf16"""

    hidden_states: Tensor
    topk_ids: Tensor
    topk_weights: Tensor


@dataclass(frozen=True)
class Layer:
    """Make it with make_layer().

    template  bf16, whole
    drawn     values of a matrix that are drawn, about; the rows after these repeat them
    biases    fp32 [E, I] and [E, H], or None
    """

    shape: Shape
    template: Expert
    drawn: int
    gate_bias: Tensor | None
    up_bias: Tensor | None
    down_bias: Tensor | None
    _stacks: dict[torch.dtype, tuple[Tensor, Tensor]] = field(default_factory=dict, repr=False)

    @property
    def interleaved(self) -> bool:
        """Whether stacked() has gate0, up0, gate1 ... as gpt-oss has, or gate, then up rows."""
        return self.shape.activation == "swigluoai"

    def shifts(self, expert: int) -> tuple[int, int]:
        """By how many rows an expert's gate and up, and its down, are moved on."""
        s = self.shape
        return (
            expert % (s.intermediate_size // W13_BLOCK) * W13_BLOCK,
            expert % (s.hidden_size // W2_BLOCK) * W2_BLOCK,
        )

    def expert(self, index: int) -> Expert:
        """One expert's weights, bf16."""
        w13, w2 = self.shifts(index)
        gate, up, down = self.template.matrices()
        return Expert(gate.roll(w13, 0), up.roll(w13, 0), down.roll(w2, 0))

    def stacked(self, dtype: torch.dtype = torch.bfloat16) -> tuple[Tensor, Tensor]:
        """gate_up [E, 2I, H] and down [E, H, I] as transformers has them; kept until forget()."""
        if dtype not in self._stacks:
            self._stacks[dtype] = self._stack(dtype)
        return self._stacks[dtype]

    def forget(self) -> None:
        """Lets stacked()'s tensors go, when nobody else holds them."""
        self._stacks.clear()

    def _stack(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        s = self.shape
        gate_up = torch.empty(s.num_experts, 2 * s.intermediate_size, s.hidden_size, dtype=dtype)
        down = torch.empty(s.num_experts, s.hidden_size, s.intermediate_size, dtype=dtype)
        for e in range(s.num_experts):
            one = self.expert(e)
            rows = gate_up[e].unflatten(0, (-1, 2) if self.interleaved else (2, -1))
            dim = 1 if self.interleaved else 0
            rows.select(dim, 0).copy_(one.gate)
            rows.select(dim, 1).copy_(one.up)
            down[e].copy_(one.down)
        return gate_up, down

    def in_place(self, dtype: torch.dtype) -> PackedExperts:
        """Our experts on stacked()'s tensors."""
        gate_up, down = self.stacked(dtype)
        bias = None
        if self.gate_bias is not None and self.up_bias is not None:
            pair = (self.gate_bias, self.up_bias)
            bias = torch.stack(pair, 2).flatten(1) if self.interleaved else torch.cat(pair, 1)
        return PackedExperts.from_tensors(
            gate_up,
            down,
            gate_up_bias=bias,
            down_bias=self.down_bias,
            activation=self.shape.activation,
            interleaved=self.interleaved,
        )

    def packed(self, format: str, modes: tuple[str, ...]) -> dict[str, PackedExperts]:
        """Our experts in the block layout, by mode; all modes share the weights."""
        s = self.shape
        one = ExpertPacker(1, s.hidden_size, s.intermediate_size, format, activation=s.activation)
        one.put(0, *self.quantized(format))
        sizes = packed_bytes(format, s.hidden_size, s.intermediate_size)
        arena = expert_arena(s.num_experts, sizes)
        blobs: tuple[list[Tensor | None], list[Tensor | None]] = ([], [])
        for e in range(s.num_experts):
            at = e * sum(sizes)
            for which, (block, rows) in enumerate(
                ((W13_BLOCK, s.intermediate_size), (W2_BLOCK, s.hidden_size))
            ):
                to = arena[at : at + sizes[which]]
                blocks = one.blobs(0)[which].view(rows // block, -1)
                _copy_moved(blocks, to.view_as(blocks), self.shifts(e)[which] // block)
                blobs[which].append(to)
                at += sizes[which]
        made = Blobs(
            get_format(format),
            scale_type_of(get_format(format)),
            s.hidden_size,
            s.intermediate_size,
            *blobs,
        )
        return {
            mode: PackedExperts.from_blobs(
                made,
                gate_bias=_rows(self.gate_bias),
                up_bias=_rows(self.up_bias),
                down_bias=_rows(self.down_bias),
                activation=s.activation,
                mode=mode,
            )
            for mode in modes
        }

    def quantized(self, format: str) -> tuple[Any, Any, Any]:
        """The template's matrices as ExpertPacker.put() takes them."""
        if get_format(format).base == "bf16":
            return self.template.matrices()
        gate, up, down = (
            _repeated_codes(quantize(rows, get_format(format)), count)
            for rows, count in zip(self.drawn_rows().matrices(), self._rows(), strict=True)
        )
        return gate, up, down

    def _rows(self) -> tuple[int, int, int]:
        return self.shape.intermediate_size, self.shape.intermediate_size, self.shape.hidden_size

    def drawn_rows(self, format: str = "bf16") -> Expert:
        """The template's rows that differ, as a format keeps them: what kernels are checked with.

        bf16, or float32 for a quantised format. fp16 and fp32 hold what was drawn as bf16 does.
        """
        rows = [w[: _period(w.shape[0], w.shape[1], self.drawn)] for w in self.template.matrices()]
        if format in ("bf16", "fp16", "fp32"):
            return Expert(*rows)
        return Expert(*(quantize(w, get_format(format)).dequantize(torch.float32) for w in rows))

    def reference(self, call: Call, rows: Expert) -> Tensor:
        """The call's result [T, hidden_size] in float64, for experts made of drawn_rows()."""
        x = call.hidden_states.double()
        ids, weights = call.topk_ids, call.topk_weights.double()
        inner, _, hidden = self._rows()
        gate, up = (_repeated(w.double() @ x.T, inner).T for w in (rows.gate, rows.up))
        slots = []
        for token in range(ids.shape[0]):
            for e in ids[token].tolist():
                w13 = self.shifts(e)[0]
                g, u = gate[token].roll(w13), up[token].roll(w13)
                if self.gate_bias is not None and self.up_bias is not None:
                    g, u = g + self.gate_bias[e].double(), u + self.up_bias[e].double()
                slots.append(apply_activation(g, u, self.shape.activation))
        down = _repeated(rows.down.double() @ torch.stack(slots).T, hidden).T
        out = torch.zeros_like(x)
        for slot, y in enumerate(down):
            token, k = divmod(slot, ids.shape[1])
            e = int(ids[token, k])
            y = y.roll(self.shifts(e)[1])
            if self.down_bias is not None:
                y = y + self.down_bias[e].double()
            out[token] += weights[token, k] * y
        return out


def make_layer(shape: Shape, seed: int = 0, drawn: int = _DRAWN) -> Layer:
    """Gaussian weights of unit gain. drawn: of Layer."""
    generator = torch.Generator().manual_seed(seed)

    def matrix(rows: int, cols: int) -> Tensor:
        some = torch.randn(_period(rows, cols, drawn), cols, generator=generator) * cols**-0.5
        return _repeated(some.bfloat16(), rows)

    def bias(size: int) -> Tensor | None:
        return torch.randn(shape.num_experts, size, generator=generator) if shape.bias else None

    hidden, inner = shape.hidden_size, shape.intermediate_size
    return Layer(
        shape,
        Expert(matrix(inner, hidden), matrix(inner, hidden), matrix(hidden, inner)),
        drawn,
        bias(inner),
        bias(inner),
        bias(hidden),
    )


def _period(rows: int, cols: int, drawn: int) -> int:
    """How many rows are drawn: whole blocks of 128, so that fp8's blocks repeat too."""
    return min(rows, max(128, drawn // cols // 128 * 128))


def _repeated(rows: Tensor, count: int) -> Tensor:
    return rows if count == len(rows) else rows[torch.arange(count) % len(rows)]


def _repeated_codes(rows: QuantizedMatrix, count: int) -> QuantizedMatrix:
    return replace(
        rows,
        codes=_repeated(rows.codes, count),
        scales=_repeated(rows.scales, count),
        zeros=None if rows.zeros is None else _repeated(rows.zeros, count),
    )


def _copy_moved(blocks: Tensor, to: Tensor, by: int) -> None:
    """to = blocks.roll(by, 0), without a temporary."""
    to[by:].copy_(blocks[: len(blocks) - by])
    to[:by].copy_(blocks[len(blocks) - by :])


def _rows(bias: Tensor | None) -> list[Tensor] | None:
    return None if bias is None else list(bias)


@cache
def _routing_weights(num_experts: int, routing: str) -> Tensor:
    return torch.ones(num_experts) if routing == "uniform" else 1 / torch.arange(1, num_experts + 1)


def make_call(shape: Shape, num_tokens: int, routing: str) -> Call:
    """A new draw. routing: "uniform", or "zipf": expert e is drawn with weight 1 / (e + 1)."""
    weights = _routing_weights(shape.num_experts, routing)
    return Call(
        torch.randn(num_tokens, shape.hidden_size).bfloat16(),
        torch.multinomial(weights.expand(num_tokens, -1), shape.top_k),
        torch.rand(num_tokens, shape.top_k).bfloat16(),
    )
