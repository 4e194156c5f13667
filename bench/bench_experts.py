# SPDX-License-Identifier: Apache-2.0
"""The op and its peers under pytest-benchmark: one benchmark a shape, format, token count and
contender, over the same tables of them as `expertyard bench`.

  pytest bench --benchmark-json=out.json                          measure
  pytest bench --benchmark-disable                                smoke: each runs once, checked
  pytest bench --shapes Mixtral-8x7B --formats int4,mxfp4 --tokens 1 --peers none   a part of it

`expertyard bench` measures the same contenders in turns between probes of the limits; its shares
and ratios are the ones that we publish.
"""

import statistics

import pytest
import torch

from expertyard.bench.layer import make_call, make_layer
from expertyard.bench.limits import Limits
from expertyard.bench.measure import Plan, check_own, check_peer, make_checks, own_variants
from expertyard.bench.peers import PEERS
from expertyard.bench.shapes import SHAPES
from expertyard.formats import get_format
from expertyard.native import _C


def pytest_generate_tests(metafunc):
    option = metafunc.config.getoption

    def chosen(name):
        return option(name).split(",")

    tokens = tuple(int(n) for n in chosen("--tokens"))
    layers = [
        (shape, format, tokens) for shape in chosen("--shapes") for format in chosen("--formats")
    ]
    metafunc.parametrize(
        "layer", layers, indirect=True, scope="module", ids=lambda p: f"{p[0]}-{p[1]}"
    )
    metafunc.parametrize("num_tokens", tokens)
    peers = [] if option("--peers") == "none" else PEERS
    metafunc.parametrize("contender", ["packed-exact", "packed-fast", "in-place", *peers])


@pytest.fixture(scope="module")
def layer(request):
    """(layer, what to measure, checks, our variants by name, peers as they are made)"""
    shape, format, tokens = request.param
    made = make_layer(SHAPES[shape])
    plan = Plan(format, tokens=tokens)
    ours = {
        "in-place" if v.experts.layout == "rows" else f"packed-{v.mode}": v
        for v in own_variants(made, format)
    }
    return made, plan, make_checks(made, plan), ours, {}


@pytest.fixture(scope="session")
def limits():
    return Limits(min(torch.get_num_threads(), _C.thread_limits()["usable"]))


def run_of(name, layer, threads):
    """(callable, our variant or None), or a skip that says why."""
    made, plan, checks, ours, peers = layer
    if name in ours:
        return ours[name].run, ours[name]
    if name not in PEERS:
        pytest.skip(f"{plan.format} has no such kernel")
    peer, base = PEERS[name], get_format(plan.format).base
    if base not in peer.beside or made.shape.activation not in peer.activations:
        pytest.skip("does not compute this")
    if reason := peer.absent():
        pytest.skip(reason)
    if name not in peers:
        peers[name] = check_peer(made, peer, plan, checks, threads)
    return peers[name], None


def bench_experts(benchmark, layer, limits, num_tokens, contender):
    made, checks = layer[0], layer[2]
    shape = made.shape
    run, variant = run_of(contender, layer, limits.num_threads)
    error = None
    if variant is not None:
        error = check_own(variant, checks, make_call(shape, num_tokens, "uniform"))
    chosen, bandwidths = [], []

    def setup():
        call = make_call(shape, num_tokens, "uniform")
        chosen.append(call.topk_ids.unique().numel())
        limits.evict()
        bandwidths.append(limits.read_gbps())
        return (call.hidden_states, call.topk_ids, call.topk_weights), {}

    benchmark.pedantic(run, setup=setup, rounds=15, warmup_rounds=1)
    if benchmark.stats is None:  # --benchmark-disable
        return
    seconds = benchmark.stats.stats.median
    gflops = shape.flops(num_tokens) / seconds / 1e9
    benchmark.extra_info.update(gflops=gflops)
    if variant is not None:
        gbps = statistics.mean(chosen) * variant.expert_bytes / seconds / 1e9
        benchmark.extra_info.update(
            kernel=variant.kernel,
            gbps=gbps,
            share_of_read=gbps / statistics.median(bandwidths),
            share_of_peak=gflops / limits.peak_gflops(variant.kernel),
            error=error,
        )
