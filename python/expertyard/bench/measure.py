# SPDX-License-Identifier: Apache-2.0
"""Measures one format of one layer: every number of tokens, ours and the peers in turn, between
probes of the limits.

  r_mem   bytes of the distinct experts that were chosen, as packed / time / read bandwidth
  r_cmp   operations / time / peak of the kernel's own multiply-add
  r_roof  max(bytes / bandwidth, operations / peak) / time: the share of what is possible

each with the probe taken just before the sample; the medians over samples are reported. All of a
round's contenders get the same call, and each starts with caches that hold none of the weights that
it will read: the probe has emptied them. As long as there are experts that the call does not want,
each contender first runs one token through those, for in a model its code is in cache too.
"""

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field

import torch
from torch import Tensor

from ..devices import machine_memory
from ..errors import KernelError
from ..formats import get_format
from ..modes import MODES, has_fast
from ..packing import packed_bytes
from ..testing import calc_diff
from ..weights import FORMAT_OF_DTYPE, PackedExperts
from .layer import Call, Layer, make_call
from .limits import Limits
from .peers import PEERS, TOLERANCE, Peer, Run
from .shapes import Shape

ROUTINGS = ("uniform", "zipf")
_IN_PLACE = {name: dtype for dtype, name in FORMAT_OF_DTYPE.items()}

_CHECKED_TOKENS = 4  # compared with float64 before anything is timed
_OWN_TOLERANCE = {"exact": 5e-3, "fast": 4e-2}
_SETTLE_SECONDS = 0.001  # after ours, whose threads sleep at once
_SHARE_OF_MEMORY = 0.7  # of what is free, for peers' weights


@dataclass(frozen=True)
class Effort:
    """How long to measure one number of tokens: seconds for each contender, and samples."""

    seconds: float = 1.0
    min_samples: int = 7
    max_samples: int = 60


QUICK = Effort(seconds=0.3, min_samples=5, max_samples=15)


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
    error: float  # relative L2 against float64 on the weights as the format keeps them
    peers: dict[str, float] = field(default_factory=dict)  # peer's median time / ours, same rounds

    def to_json(self) -> dict[str, object]:
        return asdict(self)


@dataclass(frozen=True)
class Plan:
    """What to measure of a layer in a format."""

    format: str
    modes: tuple[str, ...] = MODES
    tokens: tuple[int, ...] = (1, 4, 16, 64, 256, 1024)
    routings: tuple[str, ...] = ("uniform",)
    peers: tuple[str, ...] = ()
    effort: Effort = Effort()


@dataclass(frozen=True)
class Variant:
    """One of our ways to run the format."""

    mode: str
    experts: PackedExperts
    expert_bytes: int

    @property
    def kernel(self) -> str:
        return self.experts.kernel_name()

    def run(self, hidden_states: Tensor, topk_ids: Tensor, topk_weights: Tensor) -> Tensor:
        out: Tensor = torch.ops.expertyard.moe_experts(
            hidden_states, topk_ids, topk_weights, self.experts.handle
        )
        return out


@dataclass
class Samples:
    """Everything that was measured of one variant for one (routing, number of tokens)."""

    error: float
    seconds: list[float] = field(default_factory=list)
    gbps: list[float] = field(default_factory=list)
    r_mem: list[float] = field(default_factory=list)
    r_roof: list[float] = field(default_factory=list)
    peaks: list[float] = field(default_factory=list)
    peers: dict[str, float] = field(default_factory=dict)


def measure(
    layer: Layer,
    plan: Plan,
    limits: Limits,
    progress: Callable[[str], None] = lambda step: None,
) -> tuple[list[Result], dict[str, str]]:
    """Results, and the peers that were left out, each with the reason.

    KernelError if one of ours is wrong. A peer that fails, or is wrong, is left out.
    """
    shape = layer.shape
    what = f"{shape.name} {plan.format}"
    progress(f"{what}: packing")
    variants = own_variants(layer, plan.format, plan.modes)
    if not variants:
        return [], {}
    checks = make_checks(layer, plan)
    absent: dict[str, str] = {}
    samples: dict[tuple[str, int, str], Samples] = {}
    for peers in _groups(layer, plan, absent):
        runs: dict[str, Run] = {}
        for peer in peers:
            progress(f"{what}: making {peer.name}")
            try:
                runs[peer.name] = check_peer(layer, peer, plan, checks, limits.num_threads)
            except Exception as failure:  # someone else's code may raise anything
                absent[peer.name] = _reason(failure)
        layer.forget()
        if peers and not runs and samples:
            continue
        for routing in plan.routings:
            for num_tokens in plan.tokens:
                step = f"{what} T={num_tokens} {routing}"
                progress(step + (f" beside {', '.join(runs)}" if runs else ""))
                for variant in variants:
                    error = check_own(variant, checks, make_call(shape, num_tokens, routing))
                    samples.setdefault((routing, num_tokens, variant.kernel), Samples(error))
                _rounds(layer, plan, variants, runs, limits, num_tokens, routing, samples)
        runs.clear()  # before the next group asks how much memory is free
    return [
        _result(shape, plan.format, variant, limits.num_threads, routing, num_tokens, found)
        for routing in plan.routings
        for num_tokens in plan.tokens
        for variant in variants
        if (found := samples.get((routing, num_tokens, variant.kernel))) is not None
    ], absent


def own_variants(layer: Layer, format: str, modes: tuple[str, ...] = MODES) -> list[Variant]:
    """bf16 packed and in place; fp16, fp32 in place; the others packed, in the modes they have."""
    shape, base = layer.shape, get_format(format).base
    out = []
    if base not in ("fp16", "fp32"):
        has = MODES if has_fast(format) else ("exact",)
        size = sum(packed_bytes(format, shape.hidden_size, shape.intermediate_size))
        wanted = tuple(mode for mode in has if mode in modes)
        if wanted:
            packed = layer.packed(format, wanted)
            out += [Variant(mode, experts, size) for mode, experts in packed.items()]
    if base in _IN_PLACE and "exact" in modes:
        dtype = _IN_PLACE[base]
        out.append(Variant("exact", layer.in_place(dtype), shape.expert_params * dtype.itemsize))
    return out


@dataclass(frozen=True)
class Checks:
    """Tokens that are put into a call, and what should come out for them."""

    tokens: Call
    own: Tensor  # float64, on the weights as the format keeps them
    plain: Tensor  # on the weights as they were drawn

    def placed(self, call: Call) -> tuple[Call, Tensor]:
        """call with these tokens in it, and the rows that they have."""
        count = call.hidden_states.shape[0]
        rows = torch.linspace(0, count - 1, min(count, _CHECKED_TOKENS)).long()
        parts = []
        for name in ("hidden_states", "topk_ids", "topk_weights"):
            tensor = getattr(call, name).clone()
            tensor[rows] = getattr(self.tokens, name)[: len(rows)]
            parts.append(tensor)
        return Call(*parts), rows


def make_checks(layer: Layer, plan: Plan) -> Checks:
    tokens = make_call(layer.shape, _CHECKED_TOKENS, plan.routings[0])
    plain = layer.reference(tokens, layer.drawn_rows())
    base = get_format(plan.format).base
    if base in _IN_PLACE and base != "fp16":
        return Checks(tokens, plain, plain)
    return Checks(tokens, layer.reference(tokens, layer.drawn_rows(plan.format)), plain)


def _error(run: Run, checks: Checks, call: Call, expected: Tensor) -> float:
    placed, rows = checks.placed(call)
    got = run(placed.hidden_states, placed.topk_ids, placed.topk_weights)
    return calc_diff(got[rows], expected[: len(rows)])


def check_own(variant: Variant, checks: Checks, call: Call) -> float:
    """The relative L2 error of ours. KernelError if that is too much."""
    error = _error(variant.run, checks, call, checks.own)
    if not error < _OWN_TOLERANCE[variant.mode]:
        raise KernelError(
            f"{variant.kernel} is wrong for {call.topk_ids.shape[0]} tokens: "
            f"relative error {error:.1e}"
        )
    return error


def check_peer(layer: Layer, peer: Peer, plan: Plan, checks: Checks, threads: int) -> Run:
    """The peer, made and checked for every number of tokens. Raises what it raises."""
    base = peer.beside[get_format(plan.format).base]
    run = peer.make(layer, base, threads)
    for num_tokens in plan.tokens:
        call = make_call(layer.shape, num_tokens, plan.routings[0])
        error = _error(run, checks, call, checks.plain)
        if not error < TOLERANCE[base]:
            raise ValueError(f"its result is wrong for T={num_tokens}: relative error {error:.1e}")
    return run


def _reason(error: Exception) -> str:
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0][:120]


def _groups(layer: Layer, plan: Plan, absent: dict[str, str]) -> Iterator[list[Peer]]:
    """Peers that fit into memory together, group by group; at least one group, perhaps empty.

    Memory is asked for when a group begins, after the one before is gone.
    """
    base = get_format(plan.format).base
    waiting = []
    for peer in (PEERS[name] for name in plan.peers):
        if base not in peer.beside:
            continue
        reason = peer.absent()
        if reason is None and layer.shape.activation not in peer.activations:
            reason = f"has no {layer.shape.activation}"
        if reason is None:
            waiting.append(peer)
        else:
            absent[peer.name] = reason
    yielded = False
    while waiting:
        free = machine_memory()["cpu"] * _SHARE_OF_MEMORY
        group: list[Peer] = []
        for peer in list(waiting):
            needed = peer.needs(layer, base)
            if needed <= free:
                group.append(peer)
                free -= needed
            elif not group:
                absent[peer.name] = f"needs {needed / 2**30:.1f} GiB, {free / 2**30:.1f} are free"
                waiting.remove(peer)
        waiting = [peer for peer in waiting if peer not in group]
        if group:
            yielded = True
            yield group
    if not yielded:
        yield []


def _rounds(
    layer: Layer,
    plan: Plan,
    variants: Sequence[Variant],
    runs: dict[str, Run],
    limits: Limits,
    num_tokens: int,
    routing: str,
    samples: dict[tuple[str, int, str], Samples],
) -> None:
    shape, effort = layer.shape, plan.effort
    flops = shape.flops(num_tokens)
    here = [samples[routing, num_tokens, variant.kernel] for variant in variants]
    before = [len(s.seconds) for s in here]
    # they were all called a moment ago, to be checked
    limits.settle(max((PEERS[name].settle for name in runs), default=_SETTLE_SECONDS))
    for variant, s in zip(variants, here, strict=True):
        s.peaks += [limits.peak_gflops(variant.kernel) for _ in range(3)]
    times: dict[str, list[float]] = {name: [] for name in runs}
    settle = _SETTLE_SECONDS
    rounds = 0
    deadline = time.perf_counter() + effort.seconds * (len(variants) + len(runs))
    while rounds < effort.min_samples or (
        time.perf_counter() < deadline and rounds < effort.max_samples
    ):
        rounds += 1
        call = make_call(shape, num_tokens, routing)
        args = (call.hidden_states, call.topk_ids, call.topk_weights)
        load = torch.bincount(call.topk_ids.flatten(), minlength=shape.num_experts)
        chosen = int(load.count_nonzero())
        other = _beside(call, (load == 0).nonzero().flatten()[: shape.top_k])
        for variant, s in zip(variants, here, strict=True):
            limits.settle(settle)
            bandwidth = limits.read_gbps()
            seconds = _timed(variant.run, args, other)
            settle = _SETTLE_SECONDS
            nbytes = chosen * variant.expert_bytes
            s.seconds.append(seconds)
            s.gbps.append(nbytes / seconds / 1e9)
            s.r_mem.append(s.gbps[-1] / bandwidth)
            ideal = max(nbytes / bandwidth, flops / statistics.median(s.peaks)) / 1e9
            s.r_roof.append(ideal / seconds)
        for name, run in runs.items():
            limits.settle(settle)
            limits.read_gbps()  # for all: each starts from the same state of the caches
            times[name].append(_timed(run, args, other))
            settle = PEERS[name].settle
        limits.settle(settle)
        settle = _SETTLE_SECONDS
        for variant, s in zip(variants, here, strict=True):
            s.peaks.append(limits.peak_gflops(variant.kernel))
    for s, begin in zip(here, before, strict=True):
        ours = statistics.median(s.seconds[begin:])
        s.peers |= {name: statistics.median(t) / ours for name, t in times.items()}


Arguments = tuple[Tensor, Tensor, Tensor]


def _beside(call: Call, experts: Tensor) -> Arguments | None:
    """One token of call, through other experts; None if there are too few of them."""
    if len(experts) < call.topk_ids.shape[1]:
        return None
    return call.hidden_states[:1], experts[None].to(call.topk_ids.dtype), call.topk_weights[:1]


def _timed(run: Run, args: Arguments, before: Arguments | None) -> float:
    if before is not None:
        run(*before)
    start = time.perf_counter()
    run(*args)
    return time.perf_counter() - start


def _result(
    shape: Shape,
    format: str,
    variant: Variant,
    threads: int,
    routing: str,
    num_tokens: int,
    found: Samples,
) -> Result:
    median = statistics.median(found.seconds)
    gflops = shape.flops(num_tokens) / median / 1e9
    return Result(
        shape=shape.name,
        format=format,
        mode=variant.mode,
        kernel=variant.kernel,
        num_tokens=num_tokens,
        routing=routing,
        threads=threads,
        median_ms=median * 1e3,
        gbps=statistics.median(found.gbps),
        gflops=gflops,
        r_mem=statistics.median(found.r_mem),
        r_cmp=gflops / statistics.median(found.peaks),
        r_roof=statistics.median(found.r_roof),
        samples=len(found.seconds),
        error=found.error,
        peers=found.peers,
    )
