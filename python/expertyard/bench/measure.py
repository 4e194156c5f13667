# SPDX-License-Identifier: Apache-2.0
"""Measures one shape: every number of tokens, ours and the peers in turn, between probes.

  r_mem   bytes of the distinct experts that were chosen / time / read bandwidth
  r_cmp   operations / time / peak of the kernel's multiply-add
  r_roof  max(bytes / bandwidth, operations / peak) / time: the share of what is possible

each with the probe taken just before the sample; the medians over samples are reported.
"""

import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field

import torch
from torch import Tensor

from ..errors import KernelError
from ..native import _C
from ..testing import DTYPE_OF_FORMAT, Problem, calc_diff, random_ids
from .limits import Limits
from .peers import Run, contenders
from .shapes import Shape

_CHECKED_TOKENS = 4  # compared with float64 before anything is timed
_SETTLE_SECONDS = 0.02


@dataclass(frozen=True)
class Effort:
    """How long to measure one number of tokens."""

    seconds: float = 4.0
    min_samples: int = 5
    max_samples: int = 60


@dataclass(frozen=True)
class Result:
    """One line of the table and of the JSON (expertyard bench --json)."""

    shape: str
    format: str
    mode: str
    kernel: str
    num_tokens: int
    routing: str
    threads: int
    median_ms: float
    gbps: float
    gflops: float
    r_mem: float
    r_cmp: float
    r_roof: float
    samples: int
    error: float  # relative L2 against float64
    peers: dict[str, float] = field(default_factory=dict)  # peer's median time / ours

    def to_json(self) -> dict[str, object]:
        return asdict(self)


def make_weights(shape: Shape, format: str) -> Problem:
    """Random weights of the whole layer, faulted in; the call's tensors are empty."""
    dtype = DTYPE_OF_FORMAT[format]
    rows = 2 * shape.intermediate_size

    def normal(*size: int, scale: float) -> Tensor:
        return torch.empty(size, dtype=dtype).normal_(0, scale)

    return Problem(
        hidden_states=torch.empty(0, shape.hidden_size, dtype=torch.bfloat16),
        topk_ids=torch.empty(0, shape.top_k, dtype=torch.int64),
        topk_weights=torch.empty(0, shape.top_k),
        gate_up=normal(shape.num_experts, rows, shape.hidden_size, scale=shape.hidden_size**-0.5),
        down=normal(
            shape.num_experts,
            shape.hidden_size,
            shape.intermediate_size,
            scale=shape.intermediate_size**-0.5,
        ),
        gate_up_bias=torch.randn(shape.num_experts, rows) if shape.bias else None,
        down_bias=torch.randn(shape.num_experts, shape.hidden_size) if shape.bias else None,
        activation=shape.activation,
        interleaved=shape.activation == "swigluoai",
    )


def make_call(shape: Shape, num_tokens: int, routing: str) -> tuple[Tensor, Tensor, Tensor]:
    """hidden_states, topk_ids and topk_weights of a new draw."""
    ids = random_ids(num_tokens, shape.num_experts, shape.top_k, routing)
    hidden_states = torch.randn(num_tokens, shape.hidden_size).bfloat16()
    return hidden_states, ids, torch.rand(num_tokens, shape.top_k).bfloat16()


def check(weights: Problem, run: Run, call: tuple[Tensor, Tensor, Tensor]) -> float:
    """Relative L2 error of the first tokens of a call against float64."""
    hidden_states, ids, topk_weights = (t[:_CHECKED_TOKENS] for t in call)
    small = Problem(
        **{
            **vars(weights),
            "hidden_states": hidden_states,
            "topk_ids": ids,
            "topk_weights": topk_weights,
        }
    )
    return calc_diff(run(*call)[:_CHECKED_TOKENS], small.reference())


def measure(
    shape: Shape,
    *,
    format: str = "bf16",
    tokens: tuple[int, ...] = (1, 4, 16, 64, 256, 1024),
    routing: str = "uniform",
    peers: tuple[str, ...] = (),
    effort: Effort | None = None,
    progress: Callable[[str], None] = lambda step: None,
) -> list[Result]:
    """Measures every number of tokens of one shape. KernelError if a result is wrong."""
    effort = effort or Effort()
    weights = make_weights(shape, format)
    kernel = _C.kernel_name(format, "bfloat16")
    threads = min(torch.get_num_threads(), _C.thread_limits()["usable"])
    limits = Limits(kernel, threads)
    runs = contenders(shape, weights, peers)
    results = []
    for num_tokens in tokens:
        progress(f"{shape.name} {format} T={num_tokens}")
        results.append(
            _measure_tokens(
                shape, format, kernel, threads, num_tokens, routing, weights, runs, limits, effort
            )
        )
    return results


def _settle(limits: Limits) -> None:
    """Waits until a peer's OpenMP threads, which spin for milliseconds, are asleep.

    Waits by reading memory: cores that sleep come back slow, and that would be measured too.
    """
    end = time.perf_counter() + _SETTLE_SECONDS
    while time.perf_counter() < end:
        limits.read_gbps()


def _measure_tokens(
    shape: Shape,
    format: str,
    kernel: str,
    threads: int,
    num_tokens: int,
    routing: str,
    weights: Problem,
    runs: dict[str, Run],
    limits: Limits,
    effort: Effort,
) -> Result:
    call = make_call(shape, num_tokens, routing)
    errors = {name: check(weights, run, call) for name, run in runs.items()}
    for name, error in errors.items():
        if not error < 2e-2:
            raise KernelError(
                f"{shape.name} T={num_tokens}: {name} is wrong: relative error {error:.1e}"
            )
    flops = shape.flops(num_tokens)
    expert_bytes = shape.expert_params * weights.gate_up.element_size()
    peaks = [limits.peak_gflops() for _ in range(3)]
    times: dict[str, list[float]] = {name: [] for name in runs}
    gbps: list[float] = []
    r_mem: list[float] = []
    r_roof: list[float] = []
    deadline = time.perf_counter() + effort.seconds
    while len(r_mem) < effort.min_samples or (
        time.perf_counter() < deadline and len(r_mem) < effort.max_samples
    ):
        call = make_call(shape, num_tokens, routing)
        nbytes = int(torch.bincount(call[1].flatten()).count_nonzero()) * expert_bytes
        for name, run in runs.items():
            _settle(limits)
            bandwidth = limits.read_gbps()  # for all: each starts from the same state of the caches
            start = time.perf_counter()
            run(*call)
            seconds = time.perf_counter() - start
            times[name].append(seconds)
            if name == "expertyard":
                gbps.append(nbytes / seconds / 1e9)
                r_mem.append(gbps[-1] / bandwidth)
                ideal = max(nbytes / bandwidth, flops / statistics.median(peaks)) / 1e9
                r_roof.append(ideal / seconds)
        _settle(limits)
        peaks.append(limits.peak_gflops())
    median = statistics.median(times["expertyard"])
    gflops = flops / median / 1e9
    return Result(
        shape=shape.name,
        format=format,
        mode="exact",
        kernel=kernel,
        num_tokens=num_tokens,
        routing=routing,
        threads=threads,
        median_ms=median * 1e3,
        gbps=statistics.median(gbps),
        gflops=gflops,
        r_mem=statistics.median(r_mem),
        r_cmp=gflops / statistics.median(peaks),
        r_roof=statistics.median(r_roof),
        samples=len(r_mem),
        error=errors["expertyard"],
        peers={
            name: statistics.median(t) / median for name, t in times.items() if name != "expertyard"
        },
    )
