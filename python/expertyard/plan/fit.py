# SPDX-License-Identifier: Apache-2.0
"""Why a model does not fit: bytes missing per device, and the nearest setting that would fit."""

from __future__ import annotations

from dataclasses import replace

from expertyard.memory import GiB
from expertyard.plan.problem import Assignment, Problem, account, layer_costs, outside_modules
from expertyard.plan.request import Request
from expertyard.plan.solver import missing, solve

NARROWER = ("fp8", "int4")  # tried in this order, for the experts


def explain(problem: Problem, request: Request, assignment: Assignment) -> str:
    """The message of the PlanError."""
    uses = account(problem, assignment)
    short = {d: gap for d in problem.devices if (gap := missing(d, uses[d.name].used)) > 0}
    parts = [
        f"{device.name} needs {_gib(uses[device.name].used)} and has "
        f"{_gib(device.capacity - (0 if device.soft else device.reserve))} "
        f"({_gib(gap)} or {gap} bytes missing)"
        for device, gap in short.items()
    ]
    pinned = {pin.device: pin.why for pin in problem.pins.layers.values()}
    pinned.update(
        {pin.device: pin.why for row in problem.pins.experts.values() for pin in row.values()}
    )
    who = [f"{d.name} by {pinned[d.name]}" for d in short if d.name in pinned]
    blame = f" Pinned to {', '.join(who)}." if who else ""
    return (
        f"{problem.spec.name} does not fit with format {request.format}: "
        f"{'; '.join(parts)}.{blame} "
        f"{_advice(problem, request, short_total=sum(short.values()))}"
    )


def _advice(problem: Problem, request: Request, short_total: int) -> str:
    wider = [request.format, *NARROWER]
    for fmt in NARROWER[wider.index(request.format) if request.format in NARROWER else 0 :]:
        if _would_fit(problem, request, fmt, request.context):
            return f"--format {fmt} would fit."
    context = request.context // 2
    while context >= 256:
        if _would_fit(problem, request, request.format, context):
            return f"--context {context} would fit."
        context //= 2
    device = "cpu" if problem.cpu.capacity else problem.gpus[-1].name
    has = next(d.capacity for d in problem.devices if d.name == device)
    if problem.pins.layers or problem.pins.experts:
        return "Pin less there, or give the device more memory."
    return f"{device}={-(-(has + short_total) // GiB)}GiB would fit."


def _would_fit(problem: Problem, request: Request, format: str, context: int) -> bool:
    layers = layer_costs(
        problem.spec, format, request.dense_format, context, request.batch, problem.pins.formats
    )
    outside = outside_modules(problem.spec, request.dense_format)
    return solve(replace(problem, layers=layers, outside=outside, context=context)) is not None


def _gib(size: int) -> str:
    return f"{size / GiB:.2f} GiB"
