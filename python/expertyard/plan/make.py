# SPDX-License-Identifier: Apache-2.0
"""make_plan: read the inputs, merge their pins, solve the rest, account, explain. Pure."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

from expertyard.errors import ConfigError, PlanError
from expertyard.memory import UNLIMITED, default_bandwidth, default_reserve, parse_reserve
from expertyard.plan.fit import explain
from expertyard.plan.merge import Merged, merge
from expertyard.plan.model import DeviceUse, ExpertGroup, LayerPlan, Plan
from expertyard.plan.problem import (
    Assignment,
    Device,
    Problem,
    account,
    layer_costs,
    outside_modules,
    seconds_per_token,
)
from expertyard.plan.request import Request
from expertyard.plan.solver import best_effort, fits, solve
from expertyard.rules import Finding, read_pins
from expertyard.rules.devices import device_order, is_gpu, is_remote, local_kind
from expertyard.rules.pins import HOME
from expertyard.spec import ModelSpec

if TYPE_CHECKING:
    from expertyard.rules.profile import Profile


def make_plan(
    spec: ModelSpec, request: Request | None = None, memory: Mapping[str, int] | None = None
) -> Plan:
    """The plan of a request for a model.

    `memory` is what the machine has, bytes per device ("cuda:0", "cpu"); request.memory, where
    given,
    is what may be used of it. With neither, the devices that the request names are large enough.
    Raises RuleError for wrong inputs, ConfigError for wrong options, PlanError for what contradicts
    or does not fit.
    """
    request = request or Request()
    profile = None
    if request.profile is not None:
        from expertyard.rules.profile import read_profile

        profile = read_profile(request.profile, spec)
        if request.strategy == "trace" and not profile.tokens:
            raise ConfigError("strategy trace needs a trace in --profile; this is a profile.")
    inputs = [read_pins(field, value, spec) for field, value in request.inputs(profile).items()]
    merged = merge(spec, inputs)
    capacities, given = _capacities(request, memory, merged)
    problem, findings = _problem(spec, request, merged, capacities, given)
    if profile is not None:
        problem = replace(problem, popularity=profile.weights)
    problem, assignment = _nearest(problem)
    if assignment is None:
        assignment = best_effort(problem)
        if not fits(problem, assignment):
            raise PlanError(explain(problem, request, assignment))
    if profile is not None and profile.tokens:
        findings.append(_replayed(profile, assignment))
    return _plan(problem, request, assignment, given, list(merged.findings) + findings)


def _nearest(problem: Problem) -> tuple[Problem, Assignment | None]:
    """The solution, with layers near their pinned experts where that costs no time."""
    found = solve(problem)
    if not problem.pins.near:
        return problem, found
    layers = {**problem.pins.near, **problem.pins.layers}
    pulled = replace(problem, pins=replace(problem.pins, layers=layers))
    near = solve(pulled)
    if near is None:
        return problem, found
    times = [seconds_per_token(problem, account(problem, a)) for a in (near, found) if a]
    return (pulled, near) if times[0] <= times[-1] * (1 + 1e-12) else (problem, found)


def _replayed(profile: Profile, assignment: Assignment) -> Finding:
    """Fixed experts against an LRU cache with as many slots as the plan has GPU experts."""
    from expertyard.rules.replay import replay

    slots = {i: sum(map(is_gpu, row)) for i, row in enumerate(assignment.experts)}
    return Finding("note", "trace-replay", replay(profile.tokens, slots).sentence)


def _capacities(
    request: Request, memory: Mapping[str, int] | None, merged: Merged
) -> tuple[dict[str, int], bool]:
    """(bytes per device, whether given): of the request, else of the machine, else enough."""
    asked = request.memory_bytes()
    sizes = asked if asked is not None else dict(memory) if memory is not None else None
    if sizes is None:
        names = set(merged.devices) | {"cpu"}
        gpus = [name for name in names if is_gpu(name)]
        if merged.needs_gpu and all(name.startswith("cuda:") for name in gpus):
            names.add("cuda:0")  # what the request leaves open is on the first GPU
        return dict.fromkeys(sorted(names, key=device_order), UNLIMITED), False
    if asked is not None and memory is not None:
        absent = [name for name in asked if name not in memory]
        if absent:
            raise PlanError(f"memory names {absent[0]}, but this machine has {', '.join(memory)}.")
    for name in merged.devices:
        if name not in sizes:
            raise PlanError(
                f"{name} is named by {_who(merged, name)}, but the devices are {', '.join(sizes)}. "
                f"Give it memory, as in --memory {name}=24GiB, or name another device."
            )
    return {name: sizes[name] for name in sorted(sizes, key=device_order)}, True


def _wants_home(merged: Merged) -> bool:
    return any(pin.device == HOME for row in merged.experts.values() for pin in row.values())


def _who(merged: Merged, device: str) -> str:
    """Who names the device, for messages."""
    pins = [*merged.layers.values(), *merged.modules.values()]
    pins += [pin for row in merged.experts.values() for pin in row.values()]
    return next((pin.why for pin in pins if device in (pin.device, pin.out_device)), "the request")


def _problem(
    spec: ModelSpec,
    request: Request,
    merged: Merged,
    capacities: Mapping[str, int],
    given: bool,
) -> tuple[Problem, list[Finding]]:
    speeds = request.bandwidths()
    findings: list[Finding] = []
    explicit = None
    if request.mb_resrv_per_gpu is not None:
        explicit = parse_reserve(request.mb_resrv_per_gpu, tuple(capacities))
    first = request.priorities()
    devices = []
    for name in sorted(
        capacities, key=lambda n: (first.index(n) if n in first else len(first), *device_order(n))
    ):
        reserve = 0
        if is_gpu(name) and given:
            reserve = (
                default_reserve(capacities[name]) if explicit is None else explicit.get(name, 0)
            )
        devices.append(
            Device(
                name=name,
                capacity=capacities[name],
                reserve=reserve,
                soft=explicit is None,
                bandwidth=speeds.get(name, default_bandwidth(name)),
            )
        )
    if not any(map(is_gpu, capacities)) and _wants_home(merged):
        raise PlanError("--gpu-experts needs a GPU, but the devices are cpu only.")
    problem = Problem(
        spec=spec,
        pins=merged,
        gpus=tuple(device for device in devices if device.is_gpu),
        cpu=next(
            (device for device in devices if not device.is_gpu),
            Device("cpu", 0, 0, False, default_bandwidth("cpu")),
        ),
        layers=layer_costs(
            spec,
            request.format,
            request.dense_format,
            request.context,
            request.batch,
            merged.formats,
        ),
        strategy=request.strategy or ("uniform" if request.profile is None else "frequency"),
        outside=outside_modules(spec, request.dense_format),
        context=request.context,
        batch=request.batch,
    )
    problem = _with_pins_only(problem)
    if not spec.known_family:
        findings.append(
            Finding(
                "warning",
                "unknown-family",
                f"model_type {spec.model_type!r} is not a family that Expertyard knows; the usual "
                "layout (model.layers.N.mlp.experts) is assumed.",
            )
        )
    return problem, findings


def _with_pins_only(problem: Problem) -> Problem:
    """Devices of other processes hold what is pinned to them, and have no room for more: this
    process does not fill another's memory."""
    pinned: dict[str, int] = {}
    for number, row in problem.pins.experts.items():
        for pin in row.values():
            if is_remote(pin.device):
                size = problem.slot(number, pin)
                pinned[pin.device] = pinned.get(pin.device, 0) + size
    if not any(is_remote(gpu.name) for gpu in problem.gpus):
        return problem
    room = problem.workspace(top=False)
    return replace(
        problem,
        gpus=tuple(
            replace(gpu, capacity=min(gpu.capacity, pinned.get(gpu.name, -room) + room))
            if is_remote(gpu.name)
            else gpu
            for gpu in problem.gpus
        ),
    )


def _plan(
    problem: Problem,
    request: Request,
    assignment: Assignment,
    given: bool,
    findings: list[Finding],
) -> Plan:
    layers = tuple(_layer(problem, request, assignment, i) for i in range(len(problem.layers)))
    uses = account(problem, assignment)
    devices = {
        d.name: _use(d, uses[d.name], assignment, given)
        for d in problem.devices
        if d.is_gpu or d.capacity or uses[d.name].used
    }
    soft = [d for d in problem.gpus if d.soft and d.reserve]
    if soft and any(devices[d.name].reserved < d.reserve for d in soft):
        findings.append(_reserve_note(assignment))
    moves = {
        layer.layer: layer.device
        for before, layer in itertools.pairwise(layers)
        if layer.device != before.device
    }
    return Plan(
        model=problem.spec.name,
        num_layers=len(layers),
        layers=layers,
        transfers=moves,
        devices=devices,
        findings=tuple(findings),
        modules=dict(assignment.modules),
    )


def _reserve_note(assignment: Assignment) -> Finding:
    if not assignment.reserve_applied:
        text = (
            "everything fits on one GPU, so nothing is reserved beyond what is counted; "
            "--mb-resrv-per-gpu reserves all the same."
        )
    else:
        text = "pins take some of the memory that is usually kept free; --mb-resrv-per-gpu insists."
    return Finding("note", "reserve-not-applied", text)


def _use(device: Device, use: DeviceUse, assignment: Assignment, given: bool) -> DeviceUse:
    bandwidth = round(device.bandwidth)
    if not given:
        return replace(use, bandwidth=bandwidth)
    free = device.capacity - use.used
    reserve = device.reserve if assignment.reserve_applied or not device.soft else 0
    reserved = min(reserve, free) if device.soft else reserve
    return replace(
        use, capacity=device.capacity, reserved=reserved, free=free - reserved, bandwidth=bandwidth
    )


def _layer(problem: Problem, request: Request, assignment: Assignment, number: int) -> LayerPlan:
    pin = problem.pins.layers.get(number)
    device = assignment.layers[number]
    placed = assignment.experts[number]
    experts = None
    if problem.spec.layers[number].is_moe:
        experts = _groups(problem, request, number, device, placed)
    return LayerPlan(
        layer=number,
        device=device,
        dense_format=request.dense_format,
        why=pin.why if pin else "auto",
        experts=experts,
        bytes=problem.layers[number].dense + problem.layers[number].kv,
    )


def _groups(
    problem: Problem, request: Request, number: int, home: str, placed: list[str]
) -> tuple[ExpertGroup, ...]:
    """Experts of a layer with equal fate, in the order of their first id."""
    pins = problem.pins.experts.get(number, {})
    groups: dict[ExpertGroup, list[int]] = {}
    sizes: dict[ExpertGroup, int] = {}
    known: dict[tuple[int, str], ExpertGroup] = {}
    for expert, device in enumerate(placed):
        pin = pins.get(expert)
        key = (id(pin), device)
        if key not in known:
            op = (pin.op if pin else "") or native_op(device)
            known[key] = ExpertGroup(
                ids=(),
                device=device,
                format=(pin.format if pin else "") or problem.layers[number].format,
                op=op,
                prefill_op=(pin.prefill_op if pin else "") or op,
                prefill_device=pin.prefill_device if pin else "",
                out_device=home,
                why=pin.why if pin else "auto",
            )
        groups.setdefault(known[key], []).append(expert)
        sizes.setdefault(known[key], problem.slot(number, pin))
    return tuple(
        replace(group, ids=tuple(ids), bytes=sizes[group] * len(ids))
        for group, ids in groups.items()
    )


def native_op(device: str) -> str:
    """Our kernels' op for a device; plain torch where we have none."""
    kind = local_kind(device)
    return kind if kind in ("cpu", "cuda") else "torch"
