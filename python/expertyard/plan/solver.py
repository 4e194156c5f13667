# SPDX-License-Identifier: Apache-2.0
"""Places what no pin places: dense parts and KV first, then experts as slots by value per byte.

A byte is worth the time that reading it saves: chance of being read x (1/bandwidth of the CPU -
1/bandwidth of the GPU). Two kinds of candidates are compared by the time one token takes to read:
  one   everything free on one GPU, experts with their layer; no soft reserve, as it fits as it is
  cut   free layers cut into one range a GPU, the rest on the CPU; each GPU then takes experts of
        its own layers, and then of any other layer (cut.py finds the best one, fill.py fills it)
Neither kind's best can get slower with more memory, hence neither does the plan.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate

from expertyard.plan.cut import Cut, Free, Room, cuts, free_layers
from expertyard.plan.fill import at, fill, start
from expertyard.plan.problem import Assignment, Device, Problem, account, seconds_per_token
from expertyard.plan.queue import Queue, make_queue
from expertyard.rules.pins import HOME

GAIN_UNIT = 1e-24  # seconds a byte: gains are whole numbers of it, so that sums are exact


def solve(problem: Problem) -> Assignment | None:
    """The best assignment that fits, None if none does."""
    found: list[Assignment] = []
    if _least_bytes(problem) > sum(d.capacity for d in problem.devices):
        return None
    free = _least_bytes(problem, pinned=False)
    for gpu in problem.gpus:
        if free <= gpu.capacity and fits(problem, whole := _all_on(problem, gpu.name)):
            found.append(whole)
    if not found or not _all_alike(problem):
        cut = _best(problem)
        found += [cut] if cut is not None else []
    return min(found, key=lambda made: _rank(problem, made), default=None)


def _rank(problem: Problem, made: Assignment) -> tuple[float, int]:
    """Less is better: time, where it differs by more than rounding, then devices without layers.

    So a head that could be on either of two equal GPUs goes to one that has layers.
    """
    seconds = seconds_per_token(problem, account(problem, made))
    return float(f"{seconds:.12g}"), len({*made.modules.values()} - {*made.layers})


def best_effort(problem: Problem) -> Assignment:
    """The assignment with most bytes on GPUs, fitting or not: what an error is explained with."""
    plans = [(plan, cut) for plan in _plans(problem, _by_speed(problem)) for cut in plan.all_cuts]
    if not plans:
        layers = [_pinned(problem, i) or "cpu" for i in range(len(problem.layers))]
        return start(problem, layers, _modules(problem, "cpu"))
    best, cut = min(plans, key=lambda pair: (pair[0].cpu_bytes(pair[1]), -pair[1].worth))
    return best.build(cut)


def fits(problem: Problem, assignment: Assignment) -> bool:
    uses = account(problem, assignment)
    return all(missing(d, uses[d.name].used) <= 0 for d in problem.devices)


def missing(device: Device, used: int) -> int:
    """Bytes by which a device is too small. Only a reserve that the user gave counts here."""
    return used - (device.capacity - (0 if device.soft else device.reserve))


def _least_bytes(problem: Problem, pinned: bool = True) -> int:
    """What the model takes at the very least, with what is pinned or without it."""
    pins = problem.pins
    modules = [name for name in problem.outside if pinned or name not in pins.modules]
    total = sum(problem.outside[name][0] for name in modules)
    for number, cost in enumerate(problem.layers):
        own = pins.experts.get(number, {})
        total += (cost.num_experts - len(own)) * cost.slot
        if pinned or number not in pins.layers:
            total += cost.dense + cost.kv
        if pinned:
            total += sum(problem.slot(number, pin) for pin in own.values())
    return total


def _all_alike(problem: Problem) -> bool:
    """GPUs of one speed, above the CPU's: then nothing beats everything on one of them."""
    speeds = {gpu.bandwidth for gpu in problem.gpus}
    return len(speeds) == 1 and _gain(problem, problem.gpus[0]) > 0


def _all_on(problem: Problem, device: str) -> Assignment:
    """Every free thing on one device; free experts with their layer where that is a GPU."""
    pins = problem.pins
    layers = [_pinned(problem, i) or device for i in range(len(problem.layers))]
    experts: list[list[str]] = []
    for number, cost in enumerate(problem.layers):
        home = layers[number] if layers[number] != "cpu" else device
        own = pins.experts.get(number, {})
        experts.append(
            [at(problem, own[e], home) if e in own else home for e in range(cost.num_experts)]
        )
    used = {*layers, *(d for row in experts for d in row)} - {"cpu"}
    modules = _modules(problem, device)
    return Assignment(layers, experts, modules, reserve_applied=len(used) > 1)


def _pinned(problem: Problem, layer: int) -> str | None:
    pin = problem.pins.layers.get(layer)
    return pin.device if pin else None


def _modules(problem: Problem, base: str) -> dict[str, str]:
    pins = problem.pins.modules
    return {name: pins[name].device if name in pins else base for name in problem.outside}


def _gain(problem: Problem, gpu: Device) -> int:
    """What a byte saves when it is read there instead of by the CPU."""
    return round((1 / problem.cpu.bandwidth - 1 / gpu.bandwidth) / GAIN_UNIT)


def _by_speed(problem: Problem) -> list[Device]:
    """Fast GPUs first; among equals the order of filling."""
    return sorted(problem.gpus, key=lambda gpu: -gpu.bandwidth)


def _best(problem: Problem) -> Assignment | None:
    """The best cut that fits, over every device that could hold what lies outside the layers.

    GPUs that are slower than the CPU are used only if it has no room for the rest; a layer whose
    experts are pinned to its GPU stays on the CPU only if no GPU has room for it.
    """
    gpus = _by_speed(problem)
    quick = [gpu for gpu in gpus if _gain(problem, gpu) > 0]
    for some in [quick] if len(quick) == len(gpus) else [quick, gpus]:
        plans = _plans(problem, some)
        for tied in (True, False):
            ranked = sorted(
                (
                    (plan.worth + cut.worth, cut.local, -number, plan, cut)
                    for number, plan in enumerate(plans)
                    for cut in plan.best_cuts(tied)
                ),
                key=lambda item: item[:3],
                reverse=True,
            )
            for _, _, _, plan, cut in ranked:
                built = plan.build(cut)
                if fits(problem, built):
                    return built
    return None


def _plans(problem: Problem, gpus: list[Device]) -> list[_Base]:
    free, queue = free_layers(problem), make_queue(problem)
    found = []
    for base in [*(gpu.name for gpu in gpus), "cpu"]:
        modules = _modules(problem, base)
        rooms = _rooms(problem, modules, gpus)
        held = next((room for room in rooms if room.device.name == base), None)
        if held is None or held.left >= 0:
            found.append(_Base(problem, free, queue, rooms, modules))
    return found


@dataclass(frozen=True)
class _Base:
    """The cuts with what lies outside the layers in one place."""

    problem: Problem
    free: Free
    queue: Queue
    rooms: list[Room]
    modules: dict[str, str]

    @property
    def worth(self) -> int:
        """Of what lies outside the layers."""
        gains = {gpu.name: _gain(self.problem, gpu) for gpu in self.problem.gpus}
        reads = (
            (device, self.problem.outside_reads(name)) for name, device in self.modules.items()
        )
        return sum(gains.get(device, 0) * read for device, read in reads)

    @cached_property
    def all_cuts(self) -> list[Cut]:
        return list(cuts(self.free, self.rooms, self.queue))

    def best_cuts(self, tied: bool) -> list[Cut]:
        """The best cut that leaves the CPU no more than it has room for, as a list of at most one.

        `tied`: layers that have experts pinned to their GPU must be on one.
        """
        least = self.free.tied if tied else 0
        room = self.problem.cpu.capacity
        good = [cut for cut in self.all_cuts if cut.end >= least and self.cpu_bytes(cut) <= room]
        best = max(good, key=lambda cut: (cut.worth, cut.local), default=None)
        return [] if best is None else [best]

    def cpu_bytes(self, cut: Cut) -> int:
        """What the cut leaves on the CPU, its workspace included."""
        held, rest, sizes = self._on_cpu, self._rests[cut.end], self.queue.sizes
        rest += sizes[-1] - sizes[cut.placed]
        if not rest + held and cut.end == len(self.free.layers):
            return 0
        return rest + held + self.problem.workspace(top=_head(self.modules) == "cpu")

    @cached_property
    def _on_cpu(self) -> int:
        return _pinned_bytes(self.problem, self.modules)["cpu"]

    @cached_property
    def _rests(self) -> list[int]:
        """Bytes of the free layers after each position, without their experts."""
        costs = [self.problem.layers[i] for i in reversed(self.free.layers)]
        return list(accumulate((c.dense + c.kv for c in costs), initial=0))[::-1]

    def build(self, cut: Cut) -> Assignment:
        """The whole assignment."""
        problem = self.problem
        layers = [_pinned(problem, i) or "cpu" for i in range(len(problem.layers))]
        begin = 0
        for room, end in zip(self.rooms, cut.ends, strict=True):
            for position in range(begin, end):
                layers[self.free.layers[position]] = room.device.name
            begin = end
        assignment = start(problem, layers, self.modules)
        used = account(problem, assignment)
        spare = used["cpu"].used - problem.cpu.capacity
        fill(problem, assignment, self.rooms, self.queue, spare)
        return assignment


def _head(modules: dict[str, str]) -> str:
    """The device of the head, or of the embedding that serves as one."""
    return modules.get("lm_head") or next(iter(modules.values()))


def _pinned_bytes(problem: Problem, modules: dict[str, str]) -> dict[str, int]:
    """What pins and modules outside the layers take of each device."""
    taken = dict.fromkeys((gpu.name for gpu in problem.gpus), 0)
    taken["cpu"] = 0
    for number, cost in enumerate(problem.layers):
        home = _pinned(problem, number)
        if home is not None:
            taken[home] += cost.dense + cost.kv
        for pin in problem.pins.experts.get(number, {}).values():
            if pin.device != HOME:
                taken[pin.device] += problem.slot(number, pin)
            elif home is not None:
                taken[at(problem, pin, home)] += problem.slot(number, pin)
    for name, device in modules.items():
        taken[device] += problem.outside[name][0]
    return taken


def _rooms(problem: Problem, modules: dict[str, str], gpus: list[Device]) -> list[Room]:
    """Room of every GPU once all that is pinned is there."""
    taken = _pinned_bytes(problem, modules)
    waiting = dict.fromkeys(taken, 0)
    for number, cost in enumerate(problem.layers):
        home = _pinned(problem, number)
        if home is not None:
            waiting[home] += cost.num_experts - len(problem.pins.experts.get(number, {}))
    head = _head(modules)
    return [
        Room(
            gpu,
            gpu.capacity - gpu.reserve - taken[gpu.name] - problem.workspace(top=gpu.name == head),
            _gain(problem, gpu),
            waiting[gpu.name],
        )
        for gpu in gpus
    ]
