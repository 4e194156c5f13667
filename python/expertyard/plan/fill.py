# SPDX-License-Identifier: Apache-2.0
"""Puts the free experts of a cut into the room that its GPUs have left.

The queue says how many and, unless all are alike, which; among GPUs of one speed an expert goes to
its layer's where there is room. Fast GPUs are full before slower ones get any.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby

from expertyard.plan.cut import Room
from expertyard.plan.problem import Assignment, Problem, account
from expertyard.plan.queue import Queue
from expertyard.rules.pins import HOME, Pin


def start(problem: Problem, layers: list[str], modules: dict[str, str]) -> Assignment:
    """The assignment with all that is pinned, and the free experts on the CPU."""
    experts: list[list[str]] = []
    for number, cost in enumerate(problem.layers):
        own = problem.pins.experts.get(number, {})
        home = layers[number]
        experts.append(
            [at(problem, own[e], home) if e in own else "cpu" for e in range(cost.num_experts)]
        )
    return Assignment(layers, experts, modules)


def at(problem: Problem, pin: Pin, layer_device: str) -> str:
    """A pin's device; HOME is the layer's GPU, or the first one for a layer on the CPU."""
    if pin.device != HOME:
        return pin.device
    return layer_device if layer_device != "cpu" else problem.gpus[0].name


def fill(
    problem: Problem, assignment: Assignment, rooms: Sequence[Room], queue: Queue, spare: int
) -> None:
    """Moves free experts from the CPU to the GPUs of `rooms`, which are in the order of speed.

    A GPU that is slower than the CPU takes only what the CPU has no room for: `spare` bytes.
    """
    uses = account(problem, assignment)
    left = {
        room.device.name: room.device.capacity - room.device.reserve
        - uses[room.device.name].used
        - (0 if uses[room.device.name].workspace else problem.workspace(False))
        for room in rooms
    }  # fmt: skip
    free = [
        [e for e in range(cost.num_experts) if e not in problem.pins.experts.get(i, {})]
        for i, cost in enumerate(problem.layers)
    ]
    placed = 0
    for gain, some in groupby(rooms, key=lambda room: room.gain):
        names = [room.device.name for room in some]
        if gain <= 0:
            for name in names:
                left[name] = min(left[name], max(spare, 0))
                spare -= left[name]
        if queue.even:
            _fill_even(problem, assignment, free, left, names)
        elif queue.slot:
            placed = _fill_class(assignment, queue, left, names, placed)
        else:
            for name in names:
                end = queue.advance(placed, left[name])
                for layer, expert in queue.items[placed:end]:
                    assignment.experts[layer][expert] = name
                placed = end


def _fill_even(
    problem: Problem,
    assignment: Assignment,
    free: list[list[int]],
    left: dict[str, int],
    names: Sequence[str],
) -> None:
    """Experts that are all alike: own layers first, then any."""
    place = _from_one_end if problem.strategy in ("front", "back") else _spread_evenly
    for own_only in (True, False):
        for name in names:
            place(problem, assignment, free, left, name, own_only)


def _fill_class(
    assignment: Assignment,
    queue: Queue,
    left: dict[str, int],
    names: Sequence[str],
    placed: int,
) -> int:
    """The next experts of the queue to GPUs of one speed, with their layer where there is room."""
    slots = {name: max(left[name], 0) // queue.slot for name in names}
    end = min(placed + sum(slots.values()), len(queue.items))
    away = []
    for layer, expert in queue.items[placed:end]:
        home = assignment.layers[layer]
        if slots.get(home, 0) > 0:
            slots[home] -= 1
            assignment.experts[layer][expert] = home
        else:
            away.append((layer, expert))
    for layer, expert in away:
        name = next(name for name in names if slots[name] > 0)
        slots[name] -= 1
        assignment.experts[layer][expert] = name
    return end


def _spread_evenly(
    problem: Problem,
    assignment: Assignment,
    free: list[list[int]],
    left: dict[str, int],
    gpu: str,
    own_only: bool,
) -> None:
    """The same number of experts from each layer, one more from the first ones while room lasts."""
    rows = [
        i for i, row in enumerate(free) if row and (not own_only or assignment.layers[i] == gpu)
    ]
    if not rows or left[gpu] <= 0:
        return
    slot = problem.layers[rows[0]].slot
    low, high = 0, max(len(free[i]) for i in rows)
    while low < high:  # the largest number of each layer that fits
        middle = (low + high + 1) // 2
        need = sum(min(len(free[i]), middle) for i in rows) * slot
        low, high = (middle, high) if need <= left[gpu] else (low, middle - 1)
    for extra in (low, 1):
        for i in rows:
            number = min(extra, len(free[i]))
            if number == 0 or number * slot > left[gpu]:
                continue
            for expert in free[i][:number]:
                assignment.experts[i][expert] = gpu
            del free[i][:number]
            left[gpu] -= number * slot


def _from_one_end(
    problem: Problem,
    assignment: Assignment,
    free: list[list[int]],
    left: dict[str, int],
    gpu: str,
    own_only: bool,
) -> None:
    """As many whole layers as there is room for, from the front or the back."""
    rows = [i for i in range(len(free)) if not own_only or assignment.layers[i] == gpu]
    for i in rows if problem.strategy == "front" else reversed(rows):
        slot = problem.layers[i].slot
        number = min(len(free[i]), max(left[gpu], 0) // slot) if slot else 0
        for expert in free[i][:number]:
            assignment.experts[i][expert] = gpu
        del free[i][:number]
        left[gpu] -= number * slot
