# SPDX-License-Identifier: Apache-2.0
"""What tests and benchmarks share: random problems, poisoned memory, and how far apart is too far.

Public, so that whoever adds a kernel or an engine on top can check it the way we do.
"""

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from .formats import get_format, variant_names
from .native import _C
from .packing import ExpertPacker
from .quantize import QuantizedMatrix, quantize
from .reference import (
    SWIGLU_OAI_ALPHA,
    SWIGLU_OAI_LIMIT,
    has_gate,
    moe_experts_reference,
    split_gate_up,
)
from .weights import FORMAT_OF_DTYPE, PackedExperts

DTYPE_OF_FORMAT = {name: dtype for dtype, name in FORMAT_OF_DTYPE.items()}

# Largest relative L2 error (calc_diff) of a kernel against the float64 reference on the same
# weights, by what the kernel multiplies and what it returns:
#   float32 inside, float32 out   summation order only
#   float32 inside, 16 bits out   one rounding of the result: 2^-9 (bf16) or 2^-12 (fp16) at most
#   bf16 inputs                   h is rounded to bf16 as well
#   8-bit inputs                  as fp32 inside, against a reference that rounds x and h to 8 bits
#                                 too; here and there an h next to a border rounds the other way
TOLERANCE = {
    ("fp32 inside", torch.float32): 2e-6,
    ("fp32 inside", torch.float16): 4e-4,
    ("fp32 inside", torch.bfloat16): 2.5e-3,
    ("bf16 inputs", torch.bfloat16): 3.5e-3,
    ("8-bit inputs", torch.float32): 1e-3,
    ("8-bit inputs", torch.float16): 1.2e-3,
    ("8-bit inputs", torch.bfloat16): 3e-3,
}


@dataclass(frozen=True)
class Kernel:
    """One row of the native kernel table."""

    name: str
    format: str
    layout: str
    mode: str
    isa: str
    bf16_inputs: bool
    runnable: bool
    missing: tuple[str, ...] = field(default=())

    def __str__(self) -> str:
        return self.name

    def hidden_dtypes(self) -> tuple[torch.dtype, ...]:
        return (torch.bfloat16,) if self.bf16_inputs else (*FORMAT_OF_DTYPE,)

    def tolerance(self, hidden_dtype: torch.dtype) -> float:
        inside = "bf16 inputs" if self.bf16_inputs else "fp32 inside"
        return TOLERANCE["8-bit inputs" if self.mode == "fast" else inside, hidden_dtype]

    def formats(self) -> tuple[str, ...]:
        """Every format that the kernel serves, with its variants."""
        return (self.format, *variant_names(self.format))


def kernels() -> list[Kernel]:
    """Every CPU kernel of this build, also those that this CPU cannot run."""
    return [
        Kernel(
            name=k["name"],
            format=k["format"],
            layout=k["layout"],
            mode=k["mode"],
            isa=k["isa"],
            bf16_inputs=k["bf16_inputs"],
            runnable=k["runnable"],
            missing=(*k["missing"],),
        )
        for k in _C.kernels()
    ]


@dataclass(frozen=True)
class Problem:
    """A random call of the op and everything to check it with.

    gate_up, down   plain weights; of a quantised format: what its codes stand for, in float64
    quantized       then (gate, up, down) of each expert; (up, down) without a gate
    """

    hidden_states: Tensor
    topk_ids: Tensor
    topk_weights: Tensor
    gate_up: Tensor
    down: Tensor
    gate_up_bias: Tensor | None
    down_bias: Tensor | None
    activation: str
    interleaved: bool

    format: str = "bf16"
    layout: str = "rows"
    mode: str = "exact"
    alpha: float = SWIGLU_OAI_ALPHA
    limit: float = SWIGLU_OAI_LIMIT
    quantized: tuple[tuple[QuantizedMatrix, ...], ...] | None = None

    def pack(self) -> PackedExperts:
        if self.layout == "rows":
            return PackedExperts.from_tensors(
                self.gate_up,
                self.down,
                gate_up_bias=self.gate_up_bias,
                down_bias=self.down_bias,
                activation=self.activation,
                interleaved=self.interleaved,
                alpha=self.alpha,
                limit=self.limit,
            )
        num_experts, hidden_size, intermediate_size = self.down.shape
        scale_dtype = None
        if self.quantized is not None and self.quantized[0][0].scales.dtype != torch.uint8:
            scale_dtype = self.quantized[0][0].scales.dtype
        packer = ExpertPacker(
            num_experts,
            hidden_size,
            intermediate_size,
            self.format,
            activation=self.activation,
            alpha=self.alpha,
            limit=self.limit,
            mode=self.mode,
            scale_dtype=scale_dtype,
        )
        parts = self.parts(self.gate_up)
        biases: list[dict[str, Tensor]] = [{} for _ in range(num_experts)]
        if self.gate_up_bias is not None and self.down_bias is not None:
            *first, up_bias = self.parts(self.gate_up_bias)
            columns = {"up_bias": up_bias, "down_bias": self.down_bias}
            if first:
                columns["gate_bias"] = first[0]
            biases = [{name: b[e] for name, b in columns.items()} for e in range(num_experts)]
        for expert in range(num_experts):
            plain = (*(part[expert] for part in parts), self.down[expert])
            matrices = plain if self.quantized is None else self.quantized[expert]
            gate = matrices[0] if len(matrices) == 3 else None
            packer.put(expert, gate, *matrices[-2:], **biases[expert])
        return packer.finish()

    def parts(self, rows: Tensor) -> tuple[Tensor, ...]:
        """Views of [E, rows, ...]: gate and up, or up alone if the activation has no gate."""
        return split_gate_up(rows, self.interleaved) if has_gate(self.activation) else (rows,)

    def reference(self) -> Tensor:
        """[num_tokens, hidden_size] float64"""
        return moe_experts_reference(
            self.hidden_states,
            self.topk_ids,
            self.topk_weights,
            self.gate_up,
            self.down,
            gate_up_bias=self.gate_up_bias,
            down_bias=self.down_bias,
            activation=self.activation,
            interleaved=self.interleaved,
            alpha=self.alpha,
            limit=self.limit,
            activation_bits=8 if self.mode == "fast" else None,
        )


def random_ids(num_tokens: int, num_experts: int, top_k: int, routing: str = "uniform") -> Tensor:
    """[num_tokens, top_k] int64, no expert twice in a row.

    routing: "uniform"; "zipf", where expert e is drawn with weight 1 / (e + 1); "same", where every
    token takes experts 0 .. top_k - 1, so that some experts get everyone and others nobody.
    """
    if routing == "same":
        return torch.arange(top_k).repeat(num_tokens, 1)
    weights = torch.ones(num_experts)
    if routing == "zipf":
        weights = 1 / torch.arange(1, num_experts + 1)
    if num_tokens == 0:
        return torch.empty(0, top_k, dtype=torch.int64)
    return torch.multinomial(weights.expand(num_tokens, -1), top_k)


def random_problem(
    *,
    num_tokens: int,
    hidden_size: int,
    intermediate_size: int,
    num_experts: int,
    top_k: int,
    format: str = "bf16",
    layout: str = "rows",
    mode: str = "exact",
    scale_dtype: torch.dtype | None = None,
    hidden_dtype: torch.dtype = torch.bfloat16,
    activation: str = "silu",
    alpha: float = SWIGLU_OAI_ALPHA,
    limit: float = SWIGLU_OAI_LIMIT,
    bias: bool = False,
    interleaved: bool = False,
    routing: str = "uniform",
    seed: int = 0,
) -> Problem:
    """Gaussian weights of unit gain, Gaussian hidden states, positive routing weights.

    format   with its variant ("int4-g32"); a quantised one needs layout="blocks"
    """
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int, scale: float = 1.0) -> Tensor:
        return torch.randn(*shape, generator=generator) * scale

    dtype = DTYPE_OF_FORMAT.get(format, torch.float32)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        topk_ids = random_ids(num_tokens, num_experts, top_k, routing)
    rows = (2 if has_gate(activation) else 1) * intermediate_size
    problem = Problem(
        hidden_states=normal(num_tokens, hidden_size).to(hidden_dtype),
        topk_ids=topk_ids,
        topk_weights=torch.rand(num_tokens, top_k, generator=generator) + 0.1,
        gate_up=normal(num_experts, rows, hidden_size, scale=hidden_size**-0.5).to(dtype),
        down=normal(num_experts, hidden_size, intermediate_size, scale=intermediate_size**-0.5).to(
            dtype
        ),
        gate_up_bias=normal(num_experts, rows) if bias else None,
        down_bias=normal(num_experts, hidden_size) if bias else None,
        activation=activation,
        interleaved=interleaved,
        alpha=alpha,
        limit=limit,
        format=format,
        layout=layout,
        mode=mode,
    )
    return problem if format in DTYPE_OF_FORMAT else _quantized(problem, scale_dtype)


def _quantized(p: Problem, scale_dtype: torch.dtype | None) -> Problem:
    """The same problem with weights of p.format."""
    format = get_format(p.format)
    experts = tuple(
        tuple(quantize(m, format, scale_dtype=scale_dtype) for m in matrices)
        for matrices in zip(*p.parts(p.gate_up), p.down, strict=True)
    )
    gate_up = torch.empty(p.gate_up.shape, dtype=torch.float64)
    for index, part in enumerate(p.parts(gate_up)):
        for expert, matrices in enumerate(experts):
            part[expert].copy_(matrices[index].dequantize())
    down = torch.stack([matrices[-1].dequantize() for matrices in experts])
    return replace(p, gate_up=gate_up, down=down, quantized=experts)


def calc_diff(got: Tensor, expected: Tensor) -> float:
    """Relative L2 error |got - expected| / |expected|, in float64; 0 for two empty tensors.

    NaN or infinity in got counts as infinitely wrong.
    """
    if got.shape != expected.shape:
        raise ValueError(f"expected shape {list(expected.shape)}, got {list(got.shape)}")
    got, expected = got.double(), expected.double()
    if not torch.isfinite(got).all():
        return float("inf")
    norm = float(expected.norm())
    error = float((got - expected).norm())
    return error / norm if norm > 0 else error


def poison_scratch() -> None:
    """Fills free memory of the usual sizes with NaN, so that a kernel that leaves a part of its
    output or scratch unwritten shows it."""
    for size in (1 << 10, 1 << 14, 1 << 18, 1 << 22):
        _ = [torch.full((size,), float("nan")) for _ in range(4)]
