# SPDX-License-Identifier: Apache-2.0
"""Replays a routing trace against GPU slots: fixed experts or least recently used, which hits more?

Both are judged on the second half of the trace: fixed slots hold the most read experts of the first
half, the LRU has seen it. A hit is an expert that a token reads and that is in a slot.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Replay:
    """Hits of both ways among `reads` expert reads."""

    reads: int
    static_hits: int
    lru_hits: int

    @property
    def sentence(self) -> str:
        """Who wins and by how much."""
        if not self.reads:
            return "the trace is too short to compare fixed experts with an LRU cache."
        static, lru = 100 * self.static_hits / self.reads, 100 * self.lru_hits / self.reads
        verdict = "neither wins"
        if static != lru:
            winner = "fixed experts win" if static > lru else "an LRU cache wins"
            verdict = f"{winner} by {abs(static - lru):.1f} points"
        return (
            f"of {self.reads} expert reads in the trace's second half, fixed experts serve "
            f"{static:.1f} % from GPUs, an LRU cache of as many slots {lru:.1f} %: {verdict}."
        )


def replay(tokens: Sequence[Mapping[int, Sequence[int]]], slots: Mapping[int, int]) -> Replay:
    """Replays with `slots[layer]` slots a layer."""
    half = len(tokens) // 2
    counts: dict[int, Counter[int]] = {}
    caches: dict[int, OrderedDict[int, None]] = {}
    for token in tokens[:half]:
        for layer, ids in token.items():
            counts.setdefault(layer, Counter()).update(ids)
            _touch(caches, layer, ids, slots.get(layer, 0))
    fixed = {
        layer: {e for e, _ in sorted(c.items(), key=lambda i: (-i[1], i[0]))[: slots.get(layer, 0)]}
        for layer, c in counts.items()
    }
    reads = static_hits = lru_hits = 0
    for token in tokens[half:] if half else ():
        for layer, ids in token.items():
            reads += len(ids)
            static_hits += sum(expert in fixed.get(layer, ()) for expert in ids)
            lru_hits += _touch(caches, layer, ids, slots.get(layer, 0))
    return Replay(reads, static_hits, lru_hits)


def _touch(
    caches: dict[int, OrderedDict[int, None]], layer: int, ids: Sequence[int], size: int
) -> int:
    """Reads the experts through the layer's cache; returns how many were there."""
    cache = caches.setdefault(layer, OrderedDict())
    hits = 0
    for expert in ids:
        if expert in cache:
            hits += 1
            cache.move_to_end(expert)
        elif size:
            cache[expert] = None
            if len(cache) > size:
                cache.popitem(last=False)
    return hits
