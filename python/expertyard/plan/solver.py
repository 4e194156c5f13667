# SPDX-License-Identifier: Apache-2.0
"""Places what no pin places: dense parts and KV first, then experts as slots by value per byte.

A byte is worth the time that reading it saves: chance of being read x (1/bandwidth of the CPU -
1/bandwidth of the GPU). Dense parts and KV are read for every token, an expert with its popularity,
so dense parts win. Two kinds of candidates are compared by the time one token takes to read:
  one   everything free on one GPU, experts with their layer; no soft reserve, as it fits as it is
  cut   free layers cut into one range a GPU, in order, the rest on the CPU; the cut that is worth
        most is found exactly by dynamic programming over (GPU, layer). Each GPU then takes experts
        of its own layers, evenly or by popularity, and then of any other layer.
The cut and the number of slots can only improve with more memory, hence so does the plan.
"""

from __future__ import annotations

from dataclasses import dataclass

from expertyard.plan.problem import Assignment, Device, Problem, account, seconds_per_token
from expertyard.rules.pins import HOME, Pin

# What a slot for another GPU's layer is worth: the same bytes, two more hops. With GPUs of
# different
# speed all three are tried: hops may pay (1.0), or room is plenty and only own layers count (0.0).
REMOTE = (0.9, 1.0, 0.0)


def solve(problem: Problem) -> Assignment | None:
    """The best assignment that fits, None if none does."""
    found: list[tuple[float, Assignment]] = []
    for gpu in problem.gpus:
        whole = _all_on(problem, gpu.name)
        if fits(problem, whole):
            found.append((seconds_per_token(problem, account(problem, whole)), whole))
    same_speed = len({gpu.bandwidth for gpu in problem.gpus}) <= 1
    if not found or not same_speed:
        cuts = [_cut(problem, False, remote) for remote in (REMOTE[:1] if same_speed else REMOTE)]
        cuts = [cut for cut in cuts if fits(problem, cut)] or [_cut(problem, True)]
        for cut in cuts:
            if fits(problem, cut):
                found.append((seconds_per_token(problem, account(problem, cut)), cut))
    return min(found, key=lambda pair: pair[0])[1] if found else None


def best_effort(problem: Problem) -> Assignment:
    """The assignment with most bytes on GPUs, fitting or not: what an error is explained with."""
    return _cut(problem, by_bytes=True)


def fits(problem: Problem, assignment: Assignment) -> bool:
    uses = account(problem, assignment)
    return all(missing(d, uses[d.name].used) <= 0 for d in problem.devices)


def missing(device: Device, used: int) -> int:
    """Bytes by which a device is too small. Only a reserve that the user gave counts here."""
    return used - (device.capacity - (0 if device.soft else device.reserve))


def _all_on(problem: Problem, device: str) -> Assignment:
    """Every free thing on one device; free experts with their layer where that is a GPU."""
    pins = problem.pins
    layers = [_pinned(problem, i) or device for i in range(len(problem.layers))]
    experts: list[list[str]] = []
    for number, cost in enumerate(problem.layers):
        home = layers[number] if layers[number] != "cpu" else device
        own = pins.experts.get(number, {})
        experts.append(
            [_at(problem, own[e], home) if e in own else home for e in range(cost.num_experts)]
        )
    used = {*layers, *(d for row in experts for d in row)} - {"cpu"}
    modules = _modules(problem, device)
    return Assignment(layers, experts, modules, reserve_applied=len(used) > 1)


def _at(problem: Problem, pin: Pin, layer_device: str) -> str:
    """A pin's device; HOME is the layer's GPU, or the first one for a layer on the CPU."""
    if pin.device != HOME:
        return pin.device
    return layer_device if layer_device != "cpu" else problem.gpus[0].name


def _pinned(problem: Problem, layer: int) -> str | None:
    pin = problem.pins.layers.get(layer)
    return pin.device if pin else None


def _modules(problem: Problem, base: str) -> dict[str, str]:
    pins = problem.pins.modules
    return {name: pins[name].device if name in pins else base for name in problem.outside}


@dataclass
class _Room:
    """A GPU while it is filled: bytes left, and experts that wait in its own pinned layers."""

    device: Device
    left: int
    waiting: int


def _cut(problem: Problem, by_bytes: bool, remote: float = REMOTE[0]) -> Assignment:
    """The best cut over every device that could hold what lies outside the layers."""
    bases = [gpu.name for gpu in problem.gpus] + ["cpu"]
    best: tuple[float, list[str], dict[str, str]] | None = None
    for base in bases:
        modules = _modules(problem, base)
        rooms = _rooms(problem, modules)
        base_room = next((room for room in rooms if room.device.name == base), None)
        if base_room is not None and base_room.left < 0:
            continue
        value, layers = _best_cut(problem, rooms, by_bytes, remote)
        for name, device in modules.items():
            size, read = problem.outside[name]
            value += size if by_bytes and device != "cpu" else read * _gain(problem, device)
        if best is None or value > best[0]:
            best = (value, layers, modules)
    if best is None:
        layers = [_pinned(problem, i) or "cpu" for i in range(len(problem.layers))]
        best = (0.0, layers, _modules(problem, "cpu"))
    return _fill(problem, *best[1:], by_bytes)


def _gain(problem: Problem, device: str) -> float:
    """Seconds that a byte saves when it is read there instead of by the CPU."""
    found = next((d for d in problem.gpus if d.name == device), None)
    slow = problem.cpu.bandwidth if problem.cpu else min(d.bandwidth for d in problem.gpus) / 16
    return 0.0 if found is None else 1 / slow - 1 / found.bandwidth


def _rooms(problem: Problem, modules: dict[str, str]) -> list[_Room]:
    """Room of every GPU once all that is pinned is there."""
    charge = {gpu.name: 0 for gpu in problem.gpus}
    charge["cpu"] = 0
    waiting = dict.fromkeys(charge, 0)
    for number, cost in enumerate(problem.layers):
        home = _pinned(problem, number)
        own = problem.pins.experts.get(number, {})
        if home is not None:
            charge[home] += cost.dense + cost.kv
            waiting[home] += cost.num_experts - len(own)
        for pin in own.values():
            if pin.device != HOME:
                charge[pin.device] += problem.slot(number, pin)
            elif home is not None:
                charge[_at(problem, pin, home)] += problem.slot(number, pin)
    for name, device in modules.items():
        charge[device] += problem.outside[name][0]
    head = modules.get("lm_head") or next(iter(modules.values()))
    return [
        _Room(
            gpu,
            gpu.capacity - gpu.reserve - charge[gpu.name] - problem.workspace(top=gpu.name == head),
            waiting[gpu.name],
        )
        for gpu in problem.gpus
    ]


def _best_cut(
    problem: Problem, rooms: list[_Room], by_bytes: bool, remote: float
) -> tuple[float, list[str]]:
    """(value, device per layer): the ranges of free layers, one a GPU in order, that are worth
    most.
    """
    free = [i for i in range(len(problem.layers)) if i not in problem.pins.layers]
    slot = max((cost.slot for cost in problem.layers), default=0)
    share = max((cost.share for cost in problem.layers), default=0.0)
    own = problem.pins.experts
    size, experts = [0], [0]  # prefix sums over free layers
    read = [0.0]
    for i in free:
        cost = problem.layers[i]
        along, along_read = _along(problem, i)
        size.append(size[-1] + cost.dense + cost.kv + along)
        read.append(read[-1] + cost.dense + cost.kv + along_read)
        experts.append(experts[-1] + cost.num_experts - len(own.get(i, {})))
    total = experts[-1] + sum(room.waiting for room in rooms) + _waiting_on_cpu(problem)

    n = len(free)
    best: list[float] = [0.0] + [float("-inf")] * n
    choices: list[list[int]] = []
    for room in rooms:
        gain = _gain(problem, room.device.name)
        per_byte = 1.0 if by_bytes else gain
        per_slot = slot if by_bytes else max(share * slot * gain, 0.0)
        new = [float("-inf")] * (n + 1)
        choice = [0] * (n + 1)
        for i in range(n + 1):
            start = best[i]
            if start == float("-inf"):
                continue
            for j in range(i, n + 1):
                left = room.left - (size[j] - size[i])
                if left < 0 and j > i:
                    break
                slots = min(left // slot, total) if slot and left > 0 else 0
                local = min(slots, experts[j] - experts[i] + room.waiting)
                value = start + (read[j] - read[i]) * per_byte
                value += (local + remote * (slots - local)) * per_slot
                if value > new[j]:
                    new[j], choice[j] = value, i
        best = new
        choices.append(choice)
    end = max(range(n + 1), key=lambda j: (best[j], -j))
    layers = [_pinned(problem, i) or "cpu" for i in range(len(problem.layers))]
    value = best[end]
    for room, choice in zip(reversed(rooms), reversed(choices), strict=True):
        for position in range(choice[end], end):
            layers[free[position]] = room.device.name
        end = choice[end]
    return value, layers


def _along(problem: Problem, layer: int) -> tuple[int, float]:
    """(bytes, bytes read per token) of experts that are pinned to wherever their layer goes."""
    own = problem.pins.experts.get(layer, {})
    size, read = 0, 0.0
    for expert, pin in own.items():
        if pin.device == HOME:
            slot = problem.slot(layer, pin)
            size += slot
            read += slot * problem.weights(layer)[expert]
    return size, read


def _waiting_on_cpu(problem: Problem) -> int:
    """Free experts of layers that are pinned to the CPU; a GPU may take them."""
    return sum(
        cost.num_experts - len(problem.pins.experts.get(i, {}))
        for i, cost in enumerate(problem.layers)
        if _pinned(problem, i) == "cpu"
    )


def _fill(
    problem: Problem, layers: list[str], modules: dict[str, str], by_bytes: bool
) -> Assignment:
    """Free experts into the room that is left: own layers first, then any, fast GPUs first.

    A GPU that reads slower than the CPU gets none, unless the CPU has no room for them.
    """
    experts: list[list[str]] = []
    free: list[list[int]] = []
    for number, cost in enumerate(problem.layers):
        own = problem.pins.experts.get(number, {})
        home = layers[number]
        experts.append(
            [_at(problem, own[e], home) if e in own else "cpu" for e in range(cost.num_experts)]
        )
        free.append([e for e in range(cost.num_experts) if e not in own])
    assignment = Assignment(layers, experts, modules)
    uses = account(problem, assignment)
    left = {
        gpu.name: gpu.capacity - gpu.reserve - uses[gpu.name].used
        - (0 if uses[gpu.name].workspace else problem.workspace(False))
        for gpu in problem.gpus
    }  # fmt: skip
    quick = [gpu.name for gpu in problem.gpus if by_bytes or _gain(problem, gpu.name) > 0]
    quick.sort(key=lambda name: -_gain(problem, name))
    if problem.strategy in ("frequency", "trace"):
        _by_popularity(problem, assignment, free, {name: left[name] for name in quick})
        return assignment
    place = _spread_evenly if problem.strategy == "uniform" else _from_one_end
    for own_only in (True, False):
        for gpu in quick:
            place(problem, assignment, free, left, gpu, own_only)
    return assignment


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
    slot = [problem.layers[i].slot for i in rows]
    low, high = 0, max(len(free[i]) for i in rows)
    while low < high:  # the largest number of each layer that fits
        middle = (low + high + 1) // 2
        need = sum(min(len(free[i]), middle) * s for i, s in zip(rows, slot, strict=True))
        low, high = (middle, high) if need <= left[gpu] else (low, middle - 1)
    for extra in (low, 1):
        for i, s in zip(rows, slot, strict=True):
            number = min(extra, len(free[i]))
            if number == 0 or number * s > left[gpu]:
                continue
            for expert in free[i][:number]:
                assignment.experts[i][expert] = gpu
            del free[i][:number]
            left[gpu] -= number * s


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


def _by_popularity(
    problem: Problem, assignment: Assignment, free: list[list[int]], left: dict[str, int]
) -> None:
    """Most popular first: on its layer's GPU where there is room, else on the fastest that has
    some.
    """
    order = sorted(
        ((problem.weights(i)[e], i, e) for i, row in enumerate(free) for e in row),
        key=lambda item: (-item[0], item[1], item[2]),
    )
    for _, layer, expert in order:
        slot = problem.layers[layer].slot
        home = assignment.layers[layer]
        if left.get(home, 0) >= slot:
            target = home
        else:
            others = [gpu for gpu, room in left.items() if room >= slot]
            if not others:
                continue
            target = others[0]
        assignment.experts[layer][expert] = target
        left[target] -= slot
