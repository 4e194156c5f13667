# SPDX-License-Identifier: Apache-2.0
"""What it costs to ask the CPU in the middle of a layer, the CPU's own work apart: a layer whose
experts are all in RAM, and calls that choose none of them.

graph_flag_us  in a CUDA graph, by a flag in pinned memory: the GPU's time of one hand-off
graph_host_us  in a CUDA graph, by host functions
eager_us       outside of graphs, where a thread of the host waits: its time of one call
"""

import time
from collections.abc import Callable
from statistics import median

import torch

from expertyard import PackedExperts
from expertyard.dispatch import LayerExperts, PartPlan, Placement, RunOptions

from .timing import graph_seconds

HIDDEN, INNER, EXPERTS, TOP_K = 4096, 64, 8, 8
CALLS = 20  # in one graph: the first one's wake-up counts little, as in a model


def _layer(handoff: str) -> LayerExperts:
    packed = PackedExperts.from_tensors(
        torch.zeros(EXPERTS, 2 * INNER, HIDDEN, dtype=torch.bfloat16),
        torch.zeros(EXPERTS, HIDDEN, INNER, dtype=torch.bfloat16),
    )
    part = PartPlan(tuple(range(EXPERTS)), "cpu", "bf16", "cpu", "bench")
    return LayerExperts(
        Placement("cuda:0", (part,)), [packed], options=RunOptions(handoff=handoff, timeout=5.0)
    )


def _call(layer: LayerExperts) -> Callable[[], torch.Tensor]:
    hidden = torch.ones(1, HIDDEN, device="cuda", dtype=torch.bfloat16)
    ids = torch.full((1, TOP_K), -1, device="cuda")
    weights = torch.ones(1, TOP_K, device="cuda")
    return lambda: layer(hidden, ids, weights)


def _in_graph(handoff: str) -> float:
    layer = _layer(handoff)
    with torch.inference_mode():
        seconds = graph_seconds([_call(layer)] * CALLS)
    torch.cuda.synchronize()
    layer.check()
    return seconds * 1e6


def _eager() -> float:
    call = _call(_layer("auto"))
    times = []
    with torch.inference_mode():
        for _ in range(200):
            begin = time.perf_counter()
            call()
            times.append(time.perf_counter() - begin)
    return median(times) * 1e6


def measurements() -> dict[str, Callable[[], float]]:
    return {
        "graph_flag_us": lambda: _in_graph("flag"),
        "graph_host_us": lambda: _in_graph("host"),
        "eager_us": _eager,
    }
