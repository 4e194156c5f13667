# SPDX-License-Identifier: Apache-2.0
"""Seconds of a call, by replaying a CUDA graph that holds one call for each of several inputs."""

from collections.abc import Callable, Sequence
from statistics import median

import torch

REPLAYS = 20
LONGEST = 1.0  # seconds that one measurement may take, but for three replays at least


def graph_seconds(calls: Sequence[Callable[[], object]]) -> float:
    """Median over replays of the mean over calls."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # warm-up: modules are loaded, libraries make their handles
        for call in calls[:2]:
            call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        kept = [call() for call in calls]  # outputs live as long as the graph
    times = []
    spent = 0.0
    for replay in range(REPLAYS + 2):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        seconds = begin.elapsed_time(end) / 1e3
        spent += seconds
        if replay >= 2:
            times.append(seconds / len(kept))
        if spent > LONGEST and len(times) >= 3:
            break
    return median(times)
