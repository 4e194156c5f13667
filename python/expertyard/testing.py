# SPDX-License-Identifier: Apache-2.0
"""What tests and benchmarks share: random problems, poisoned memory, and how far apart is too far.

Public, so that whoever adds a kernel or an engine on top can check it the way we do.
"""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from .native import _C
from .reference import moe_experts_reference
from .weights import FORMAT_OF_DTYPE, PackedExperts

DTYPE_OF_FORMAT = {name: dtype for dtype, name in FORMAT_OF_DTYPE.items()}

# Largest relative L2 error (calc_diff) of a kernel against the float64 reference on the same
# weights, by what the kernel multiplies and what it returns:
#   float32 inside, float32 out   summation order only
#   float32 inside, 16 bits out   one rounding of the result: 2^-9 (bf16) or 2^-12 (fp16) at most
#   bf16 inputs                   h is rounded to bf16 as well
TOLERANCE = {
    ("fp32 inside", torch.float32): 2e-6,
    ("fp32 inside", torch.float16): 4e-4,
    ("fp32 inside", torch.bfloat16): 2.5e-3,
    ("bf16 inputs", torch.bfloat16): 3.5e-3,
}


@dataclass(frozen=True)
class Kernel:
    """One row of the native kernel table."""

    name: str
    format: str
    isa: str
    bf16_inputs: bool
    runnable: bool
    missing: tuple[str, ...] = field(default=())

    def __str__(self) -> str:
        return self.name

    def hidden_dtypes(self) -> tuple[torch.dtype, ...]:
        return (torch.bfloat16,) if self.bf16_inputs else (*FORMAT_OF_DTYPE,)

    def tolerance(self, hidden_dtype: torch.dtype) -> float:
        return TOLERANCE["bf16 inputs" if self.bf16_inputs else "fp32 inside", hidden_dtype]


def kernels() -> list[Kernel]:
    """Every CPU kernel of this build, also those that this CPU cannot run."""
    return [
        Kernel(k["name"], k["format"], k["isa"], k["bf16_inputs"], k["runnable"], (*k["missing"],))
        for k in _C.kernels()
    ]


@dataclass(frozen=True)
class Problem:
    """A random call of the op and everything to check it with."""

    hidden_states: Tensor
    topk_ids: Tensor
    topk_weights: Tensor
    gate_up: Tensor
    down: Tensor
    gate_up_bias: Tensor | None
    down_bias: Tensor | None
    activation: str
    interleaved: bool

    def pack(self) -> PackedExperts:
        return PackedExperts.from_tensors(
            self.gate_up,
            self.down,
            gate_up_bias=self.gate_up_bias,
            down_bias=self.down_bias,
            activation=self.activation,
            interleaved=self.interleaved,
        )

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
    hidden_dtype: torch.dtype = torch.bfloat16,
    activation: str = "silu",
    bias: bool = False,
    interleaved: bool = False,
    routing: str = "uniform",
    seed: int = 0,
) -> Problem:
    """Gaussian weights of unit gain, Gaussian hidden states, positive routing weights."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int, scale: float = 1.0) -> Tensor:
        return torch.randn(*shape, generator=generator) * scale

    dtype = DTYPE_OF_FORMAT[format]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        topk_ids = random_ids(num_tokens, num_experts, top_k, routing)
    rows = 2 * intermediate_size
    return Problem(
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
    )


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
