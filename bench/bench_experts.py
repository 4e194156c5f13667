# SPDX-License-Identifier: Apache-2.0
"""The op and its peers under pytest-benchmark: one benchmark a contender, shape and token count.

  pytest bench --benchmark-json=out.json          measure
  pytest bench --benchmark-disable                smoke: each runs once, its result is checked
  pytest bench --shapes Mixtral-8x7B --tokens 1   a part of it

`expertyard bench` measures the same contenders in turns between probes of the limits; its shares
and ratios are the ones that we publish.
"""

import pytest

from expertyard.bench.limits import Limits
from expertyard.bench.measure import check, make_call, make_weights
from expertyard.bench.peers import PEERS, contenders
from expertyard.bench.shapes import SHAPES
from expertyard.native import _C


@pytest.fixture(scope="module")
def layer(request):
    shape = SHAPES[request.param]
    weights = make_weights(shape, "bf16")
    return shape, weights, contenders(shape, weights, PEERS)


@pytest.fixture(scope="session")
def limits():
    return Limits(_C.kernel_name("bf16", "bfloat16"), _C.thread_limits()["usable"])


def pytest_generate_tests(metafunc):
    option = metafunc.config.getoption
    metafunc.parametrize("layer", option("--shapes").split(","), indirect=True, scope="module")
    metafunc.parametrize("num_tokens", [int(n) for n in option("--tokens").split(",")])
    metafunc.parametrize("contender", ["expertyard", *PEERS])


def bench_experts(benchmark, layer, limits, num_tokens, contender):
    shape, weights, runs = layer
    run = runs[contender]
    error = check(weights, run, make_call(shape, num_tokens, "uniform"))
    assert error < 2e-2

    bandwidths, nbytes = [], []

    def setup():
        call = make_call(shape, num_tokens, "uniform")
        nbytes.append(call[1].unique().numel() * shape.expert_params * 2)
        bandwidths.append(limits.read_gbps())  # and the caches hold the probe's memory, not ours
        return call, {}

    benchmark.pedantic(run, setup=setup, rounds=15, warmup_rounds=1)
    if benchmark.stats is None:  # --benchmark-disable
        return
    seconds = benchmark.stats.stats.median
    gbps = sum(nbytes) / len(nbytes) / seconds / 1e9
    gflops = shape.flops(num_tokens) / seconds / 1e9
    benchmark.extra_info.update(
        gbps=gbps,
        gflops=gflops,
        share_of_read=gbps / (sum(bandwidths) / len(bandwidths)),
        share_of_peak=gflops / limits.peak_gflops(),
        error=error,
    )
