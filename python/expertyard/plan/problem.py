# SPDX-License-Identifier: Apache-2.0
"""The placement problem in numbers: bytes of everything, what is pinned, devices with room and
speed.

Also the accounting: what an assignment takes of each device, and how long one token reads.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from expertyard.memory import workspace_bytes
from expertyard.plan.merge import Merged
from expertyard.plan.model import DeviceUse
from expertyard.rules.pins import HOME, Pin
from expertyard.spec import ModelSpec
from expertyard.spec.model import Module, shapes_bytes

READ_UNIT = 1 << 20  # parts of a byte in which reads are summed: whole numbers add up exactly


@dataclass(frozen=True)
class Device:
    """A device as data. `reserve` is kept free; a soft one yields to pins."""

    name: str
    capacity: int
    reserve: int
    soft: bool
    bandwidth: float

    @property
    def is_gpu(self) -> bool:
        return self.name != "cpu"


@dataclass(frozen=True)
class LayerCost:
    """Bytes of one layer. `weight` of an expert is the chance that one token reads it."""

    dense: int
    kv: int
    num_experts: int
    expert: int  # one expert's matrices
    bias: int  # one expert's biases
    share: float  # weight of an expert when nothing is known: top_k / num_experts
    format: str  # of the routed experts

    @property
    def slot(self) -> int:
        return self.expert + self.bias


@dataclass(frozen=True)
class Problem:
    """Everything the solver looks at. `gpus` in filling order; `popularity`: layer -> weight per
    expert.
    """

    spec: ModelSpec
    pins: Merged
    gpus: tuple[Device, ...]
    cpu: Device  # with a capacity of 0 where there is none
    layers: tuple[LayerCost, ...]
    outside: Mapping[str, tuple[int, int]]  # module -> (bytes, bytes read per token)
    context: int
    batch: int
    popularity: Mapping[int, Sequence[float]] | None = None
    strategy: str = "uniform"

    @property
    def devices(self) -> tuple[Device, ...]:
        return (*self.gpus, self.cpu)

    def weights(self, layer: int) -> Sequence[float]:
        """Chance per expert of the layer that one token reads it."""
        cost = self.layers[layer]
        if self.popularity is not None and layer in self.popularity:
            return self.popularity[layer]
        return (cost.share,) * cost.num_experts

    def reads(self, layer: int) -> Sequence[int]:
        """Reads per token of each expert of a layer, if it has the layer's format."""
        return self._reads[layer]

    @cached_property
    def _reads(self) -> list[Sequence[int]]:
        known: dict[tuple[int, float, int], Sequence[int]] = {}
        found: list[Sequence[int]] = []
        for layer, cost in enumerate(self.layers):
            if self.popularity is not None and layer in self.popularity:
                found.append([read_units(cost.slot, w) for w in self.popularity[layer]])
                continue
            key = (cost.slot, cost.share, cost.num_experts)
            if key not in known:
                known[key] = (read_units(cost.slot, cost.share),) * cost.num_experts
            found.append(known[key])
        return found

    def dense_reads(self, layer: int) -> int:
        """Reads per token of what a layer has besides its routed experts."""
        cost = self.layers[layer]
        return (cost.dense + cost.kv) * READ_UNIT

    def outside_reads(self, name: str) -> int:
        """Reads per token of a module outside the layers."""
        return self.outside[name][1] * READ_UNIT

    def along(self, layer: int) -> tuple[int, int]:
        """(bytes, reads per token) of experts that are pinned to wherever their layer goes."""
        size = reads = 0
        for expert, pin in self.pins.experts.get(layer, {}).items():
            if pin.device == HOME:
                slot = self.slot(layer, pin)
                size += slot
                reads += read_units(slot, self.weights(layer)[expert])
        return size, reads

    def expert(self, layer: int, pin: Pin | None) -> tuple[int, int]:
        """(bytes of matrices, of biases) of one expert; a pin may have a format of its own."""
        cost = self.layers[layer]
        if pin is None or not pin.format or pin.format == cost.format:
            return cost.expert, cost.bias
        spec = self.spec.layers[layer]
        return spec.expert_bytes(pin.format), spec.expert_bias_bytes(pin.format)

    def slot(self, layer: int, pin: Pin | None) -> int:
        """Bytes of one expert."""
        return sum(self.expert(layer, pin))

    def workspace(self, top: bool) -> int:
        return self._workspaces[top]

    @cached_property
    def _workspaces(self) -> tuple[int, int]:
        first, second = (
            workspace_bytes(self.spec, self.context, self.batch, top) for top in (False, True)
        )
        return first, second


def read_units(size: int, chance: float) -> int:
    """What is read of `size` bytes, on average, that a token needs with this chance."""
    return round(chance * (size * READ_UNIT))


@dataclass
class Assignment:
    """Device of every layer, of every expert, and of what lies outside the layers."""

    layers: list[str]
    experts: list[list[str]]
    modules: dict[str, str]
    reserve_applied: bool = True

    @property
    def base(self) -> str:
        """The device of the head (or of the embedding that serves as one)."""
        return self.modules.get("lm_head") or next(iter(self.modules.values()))


def layer_costs(
    spec: ModelSpec,
    format: str,
    dense_format: str,
    context: int,
    batch: int,
    formats: Mapping[int, str] | None = None,
) -> tuple[LayerCost, ...]:
    """Bytes of every layer; `formats` has layers whose experts are in another format."""
    costs: list[LayerCost] = []
    known: dict[object, LayerCost] = {}
    for layer in spec.layers:
        fmt = (formats or {}).get(layer.layer, format)
        stored = (layer.stored_dense, layer.stored_experts)
        key = (layer.dense, layer.experts, stored, layer.window, fmt)
        if key not in known:
            e = layer.experts
            known[key] = LayerCost(
                dense=layer.dense_bytes(dense_format),
                kv=layer.kv_bytes(context, batch),
                num_experts=e.num_experts if e else 0,
                expert=layer.expert_bytes(fmt),
                bias=layer.expert_bias_bytes(fmt),
                share=e.top_k / e.num_experts if e else 0.0,
                format=fmt,
            )
        costs.append(known[key])
    return tuple(costs)


def outside_modules(spec: ModelSpec, dense_format: str) -> dict[str, tuple[int, int]]:
    """Modules outside the layers: name -> (bytes, bytes read per decoded token)."""
    by_part = {
        "embedding": spec.embedding, "head": spec.head, "norm": spec.norm, "vision": spec.vision,
    }  # fmt: skip
    found: dict[str, tuple[int, int]] = {}
    names = {m.part: m for m in spec.tree if m.layer is None}
    for part, shapes in by_part.items():
        module = names.get(part, Module(part, (), part))
        size = shapes_bytes(shapes, dense_format)
        if part == "head" and not shapes:
            found[module.name] = (0, 0)
            continue
        if shapes:
            reads = part in ("head", "norm") or (part == "embedding" and not spec.head)
            found[module.name] = (size, size if reads else 0)
    return found


def account(problem: Problem, assignment: Assignment) -> dict[str, DeviceUse]:
    """What the assignment takes of each device. Capacity, reserve and free are not filled in."""
    weights = dict.fromkeys((d.name for d in problem.devices), 0)
    experts, kv, reads = dict(weights), dict(weights), dict(weights)
    busy: set[str] = set()
    for number, cost in enumerate(problem.layers):
        home = assignment.layers[number]
        busy.add(home)
        weights[home] += cost.dense
        kv[home] += cost.kv
        reads[home] += problem.dense_reads(number)
        placed = assignment.experts[number]
        if not placed:
            continue
        own = problem.pins.experts.get(number)
        usual = problem.reads(number)
        if own is None and problem.popularity is None:
            for device in set(placed):
                busy.add(device)
                several = placed.count(device)
                experts[device] += several * cost.expert
                weights[device] += several * cost.bias
                reads[device] += several * usual[0]
            continue
        groups: dict[tuple[str, str], tuple[Pin | None, list[int]]] = {}
        for expert, device in enumerate(placed):
            pin = own.get(expert) if own else None
            key = (device, pin.format if pin else "")
            if key not in groups:
                groups[key] = (pin, [])
            groups[key][1].append(expert)
        for (device, _), (pin, ids) in groups.items():
            size, bias = problem.expert(number, pin)
            busy.add(device)
            experts[device] += len(ids) * size
            weights[device] += len(ids) * bias
            if size + bias == cost.slot:
                reads[device] += sum([usual[e] for e in ids])
            else:
                chances = problem.weights(number)
                reads[device] += sum(read_units(size + bias, chances[e]) for e in ids)
    for name, device in assignment.modules.items():
        weights[device] += problem.outside[name][0]
        reads[device] += problem.outside_reads(name)
        busy.add(device)
    return {
        name: DeviceUse(
            weights=weights[name],
            experts=experts[name],
            kv=kv[name],
            workspace=problem.workspace(name == assignment.base) if name in busy else 0,
            read_per_token=round(reads[name] / READ_UNIT),
        )
        for name in weights
    }


def seconds_per_token(problem: Problem, uses: Mapping[str, DeviceUse]) -> float:
    """Reads of one token, device after device."""
    return sum(uses[device.name].read_per_token / device.bandwidth for device in problem.devices)
