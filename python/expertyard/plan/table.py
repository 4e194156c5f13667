# SPDX-License-Identifier: Apache-2.0
"""A plan as tables for people: runs of equal layers, bytes per device by kind, reads, findings."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from expertyard.memory import GiB
from expertyard.plan.model import LayerPlan, Plan
from expertyard.rules.pins import Finding
from expertyard.rules.ranges import format_ids

MANY_RUNS = 12  # rows that are still read one after another
MANY = 3  # notes about foreign rules that are still listed one by one
_STYLES = {"error": "bold red", "warning": "yellow", "note": "dim"}


def render(plan: Plan) -> RenderableType:
    """Everything that `expertyard plan` prints, as one rich renderable."""
    parts: list[RenderableType] = [Text(f"{plan.model}: {plan.num_layers} layers"), _layers(plan)]
    if plan.modules:
        outside = ", ".join(f"{name} on {device}" for name, device in plan.modules.items())
        parts.append(Text(f"outside the layers: {outside}"))
    moves = ", ".join(f"before layer {i} to {device}" for i, device in plan.transfers.items())
    parts += [Text(f"hidden states move: {moves or 'never'}"), Text(""), _devices(plan)]
    parts.append(Text(_speed(plan)))
    if plan.findings:
        parts.append(Text(""))
        said = _brief(plan.findings)
        parts += [Text(str(f), style=_STYLES.get(f.severity, "")) for f in said]
    return Group(*parts)


def _brief(findings: Sequence[Finding]) -> list[Finding]:
    """The findings, with the many notes about one file's foreign rules as one."""
    said: list[Finding] = []
    foreign: dict[str, list[Finding]] = {}
    for finding in findings:
        if finding.code == "foreign-rule" and finding.line:
            foreign.setdefault(finding.file, []).append(finding)
        else:
            said.append(finding)
    for file, notes in foreign.items():
        if len(notes) > MANY:
            text = (
                f"{len(notes)} rules are about classes that are not ours: their devices are "
                f"honoured, the implementations are the model's own (lines "
                f"{format_ids(note.line for note in notes)}; --json lists them)."
            )
            notes = [Finding("note", "foreign-rule", text, file)]
        said += notes
    return said


def runs(plan: Plan) -> list[list[LayerPlan]]:
    """Neighbouring layers that are placed alike; where they alternate, all that are."""
    found: list[list[LayerPlan]] = []
    alike: dict[object, list[LayerPlan]] = {}
    last = None
    for layer in plan.layers:
        groups = [(len(g.ids), g.device, g.format, g.op, g.why) for g in layer.experts or ()]
        key = (layer.device, layer.why, layer.dense_format, layer.experts is None, *groups)
        if key != last:
            found.append([])
        found[-1].append(layer)
        alike.setdefault(key, []).append(layer)
        last = key
    return found if len(found) <= MANY_RUNS else list(alike.values())


def _layers(plan: Plan) -> Table:
    table = Table(box=None, header_style="bold", pad_edge=False)
    table.add_column("layers", overflow="fold", max_width=24)
    table.add_column("attention", no_wrap=True)
    table.add_column("experts a layer", no_wrap=True)
    table.add_column("GiB", justify="right", no_wrap=True)
    table.add_column("why", overflow="fold")
    for run in runs(plan):
        first = run[0]
        name = format_ids(layer.layer for layer in run).replace(",", ", ")
        groups = first.experts or ()
        experts = [f"{len(g.ids)} on {g.device} {g.format}" for g in groups] or ["dense"]
        sizes = [sum(layer.bytes for layer in run)]
        every = [layer.experts or () for layer in run]
        sizes += [sum(each[i].bytes for each in every) for i in range(len(groups))]
        why = [first.why, *(g.why for g in groups)]
        lines = max(len(experts), 1)
        for line in range(lines):
            reason = first.why if not groups or first.why == groups[line].why else why[line + 1]
            if line == 0 and groups and first.why != groups[0].why:
                reason = f"{first.why}; experts {groups[0].why}"
            size = (sizes[0] if line == 0 else 0) + (sizes[line + 1] if groups else 0)
            table.add_row(
                name if line == 0 else "",
                f"{first.device} {first.dense_format}" if line == 0 else "",
                experts[line],
                f"{size / GiB:.2f}",
                reason,
            )
    return table


def _devices(plan: Plan) -> Table:
    table = Table(box=None, header_style="bold", pad_edge=False)
    table.add_column("GiB", no_wrap=True)
    kinds = ("weights", "experts", "kv", "workspace", "reserved", "free", "capacity")
    for kind in kinds:
        table.add_column("KV" if kind == "kv" else kind, justify="right", no_wrap=True)
    table.add_column("read/token", justify="right", no_wrap=True)
    for name, use in plan.devices.items():
        known = use.capacity > 0
        cells = [
            f"{getattr(use, kind) / GiB:.2f}" if known or kind not in ("free", "capacity") else "?"
            for kind in kinds
        ]
        table.add_row(name, *cells, f"{use.read_per_token / GiB:.3f}")
    return table


def _speed(plan: Plan) -> str:
    """The bound that reading puts on decoding."""
    seconds = plan.seconds_per_token
    if not seconds:
        return ""
    speeds = ", ".join(
        f"{name} {use.bandwidth / 1e9:.0f} GB/s"
        for name, use in plan.devices.items()
        if use.read_per_token
    )
    return f"reading alone allows {1 / seconds:.1f} tokens/s (with {speeds})"
