# SPDX-License-Identifier: Apache-2.0
"""The free experts in the order in which they get a place on a GPU, and what each is worth.

Strategies: uniform (the first of every layer, then the second of every layer, ...), front and back
(layer after layer from one end), frequency and trace (most read first). Within a layer the most
read come first. Whatever room there is, the first so many of this queue are on GPUs: more room
adds experts and takes none away.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

from expertyard.plan.problem import Problem


@dataclass(frozen=True)
class Queue:
    """`items` are (layer, expert); sizes[n] and reads[n] are sums over the first n of them.

    Sizes are bytes, reads are in problem.READ_UNITs per token. `slot` is the size of each, or 0
    when they differ; `even`: all are alike, so it does not matter which are taken.
    """

    items: Sequence[tuple[int, int]]
    sizes: Sequence[int]
    reads: Sequence[int]
    slot: int
    even: bool

    def advance(self, start: int, room: int) -> int:
        """The position after as many from `start` on as fit into `room` bytes, none skipped."""
        if room <= 0:
            return start
        if self.slot:
            return min(start + room // self.slot, len(self.items))
        return bisect_right(self.sizes, self.sizes[start] + room) - 1


def make_queue(problem: Problem) -> Queue:
    """The queue of every expert that no pin places."""
    rows: list[list[int]] = []
    for number, cost in enumerate(problem.layers):
        own = problem.pins.experts.get(number, {})
        reads = problem.reads(number)
        free = [e for e in range(cost.num_experts) if e not in own]
        if problem.popularity is not None:
            free.sort(key=lambda e: (-reads[e], e))
        rows.append(free)
    items = _ordered(problem, rows)
    slots = [problem.layers[layer].slot for layer, _ in items]
    reads_of = [problem.reads(layer) for layer in range(len(rows))]
    reads = [reads_of[layer][expert] for layer, expert in items]
    same = len(set(slots)) <= 1
    return Queue(
        items=items,
        sizes=[0, *accumulate(slots)],
        reads=[0, *accumulate(reads)],
        slot=slots[0] if slots and same else 0,
        even=same and len(set(reads)) <= 1,
    )


def _ordered(problem: Problem, rows: Sequence[Sequence[int]]) -> list[tuple[int, int]]:
    if problem.strategy in ("frequency", "trace"):
        every = [(problem.reads(i)[e], i, e) for i, row in enumerate(rows) for e in row]
        # by what a byte is worth: experts of other formats have other sizes
        slots = [max(cost.slot, 1) for cost in problem.layers]
        every.sort(key=lambda item: (-item[0] / slots[item[1]], item[1], item[2]))
        return [(layer, expert) for _, layer, expert in every]
    if problem.strategy == "uniform":
        longest = max(map(len, rows), default=0)
        return [(i, row[n]) for n in range(longest) for i, row in enumerate(rows) if n < len(row)]
    layers = range(len(rows))
    order = layers if problem.strategy == "front" else reversed(layers)
    return [(i, expert) for i in order for expert in rows[i]]
