# SPDX-License-Identifier: Apache-2.0
"""The best cut of the free layers into one range a GPU, by dynamic programming. Exact.

GPUs take ranges in the order of their speed, front to back, and the rest stays on the CPU; the room
that a GPU has left takes experts from the queue, fast GPUs first. A cut is worth the time that its
GPUs save one token against the CPU. State: (GPUs done, layers placed, experts placed); few numbers
of experts are possible for the first two, so the best of all cuts is found. Every cut's worth can
only grow with memory, hence so does the best one's: more memory is never slower.
All sums are whole numbers, so equal cuts are equal, and locality decides among them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from expertyard.plan.problem import Device, Problem
from expertyard.plan.queue import Queue


@dataclass(frozen=True)
class Room:
    """A GPU while it is filled: bytes left, what a read unit saves there, and how many free
    experts wait in layers that are pinned to it.
    """

    device: Device
    left: int
    gain: int
    waiting: int


@dataclass(frozen=True)
class Free:
    """Prefix sums over the free layers: bytes, reads, and the free experts in them.

    `tied` is the position after the last layer whose experts are pinned to the layer's GPU.
    """

    layers: Sequence[int]
    size: Sequence[int]
    reads: Sequence[int]
    experts: Sequence[int]
    tied: int


@dataclass(frozen=True)
class Cut:
    """`worth` in gain x read units; `ends`: for each room the position after its range; `placed`:
    experts of the queue that are on GPUs.
    """

    worth: int
    local: int
    ends: tuple[int, ...]
    placed: int

    @property
    def end(self) -> int:
        """The position after the last layer that is on a GPU."""
        return self.ends[-1] if self.ends else 0


# (experts placed, worth, experts that are with their layer, end of the last range, state before)
_State = tuple[int, int, int, int, "_State | None"]


def free_layers(problem: Problem) -> Free:
    """The layers that no pin places, summed up."""
    layers = [i for i in range(len(problem.layers)) if i not in problem.pins.layers]
    size, reads, experts, tied = [0], [0], [0], 0
    for position, i in enumerate(layers, 1):
        cost = problem.layers[i]
        along, along_reads = problem.along(i)
        size.append(size[-1] + cost.dense + cost.kv + along)
        reads.append(reads[-1] + problem.dense_reads(i) + along_reads)
        own = problem.pins.experts.get(i, {})
        experts.append(experts[-1] + cost.num_experts - len(own))
        tied = position if along else tied
    return Free(layers, size, reads, experts, tied)


def cuts(free: Free, rooms: Sequence[Room], queue: Queue) -> Iterator[Cut]:
    """For each number of layers and experts that GPUs can take, the cut worth most."""
    states: dict[int, list[_State]] = {0: [(0, 0, 0, 0, None)]}
    gains = [room.gain for room in rooms] + [0]
    for room, next_gain in zip(rooms, gains[1:], strict=True):
        states = _next(free, room, queue, states, next_gain)
    for last in states.values():
        for state in last:
            yield Cut(state[1], state[2], _ends(state), state[0])


def _next(
    free: Free, room: Room, queue: Queue, states: dict[int, list[_State]], next_gain: int
) -> dict[int, list[_State]]:
    """States after one more GPU. `next_gain` is that of the GPU after it, 0 after the last."""
    size, reads, experts = free.size, free.reads, free.experts
    queue_reads, slot, total = queue.reads, queue.slot, len(queue.items)
    gain, waiting = room.gain, room.waiting
    found: dict[int, dict[int, _State]] = {}
    for start, some in states.items():
        for end in range(start, len(size)):
            left = room.left - (size[end] - size[start])
            if left < 0 and end > start:
                break
            dense = (reads[end] - reads[start]) * gain
            here = experts[end] - experts[start] + waiting
            slots = left // slot if slot and left > 0 else 0
            if end not in found:
                found[end] = {}
            best = found[end]
            for state in some:
                placed, worth, local = state[0], state[1] + dense, state[2]
                after = placed
                if slots:
                    after = placed + slots if placed + slots < total else total
                elif left > 0 and not slot:
                    after = queue.advance(placed, left)
                    slots = after - placed
                if after > placed:
                    worth += (queue_reads[after] - queue_reads[placed]) * gain
                local += slots if slots < here else here
                old = best.get(after)
                if old is None or (worth, local) > (old[1], old[2]):
                    best[after] = (after, worth, local, end, state)
                if not slot:
                    slots = 0
    return {end: _undominated(best, queue_reads, next_gain) for end, best in found.items()}


def _undominated(best: dict[int, _State], reads: Sequence[int], next_gain: int) -> list[_State]:
    """The states that may still win. With fewer experts placed, better ones are left for the next
    GPUs, but they earn at most `next_gain` each there: what remains after that must be worth more.
    """
    if len(best) == 1:
        return list(best.values())
    kept: list[_State] = []
    most = 0
    for placed in sorted(best, reverse=True):
        least = best[placed][1] - next_gain * reads[placed]
        if not kept or least > most:
            kept.append(best[placed])
            most = least
    return kept


def _ends(state: _State) -> tuple[int, ...]:
    ends: list[int] = []
    at: _State | None = state
    while at is not None and at[4] is not None:
        ends.append(at[3])
        at = at[4]
    return tuple(reversed(ends))
