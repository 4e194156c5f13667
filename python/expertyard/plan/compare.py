# SPDX-License-Identifier: Apache-2.0
"""Two plans side by side, for --what-if: devices, reads and speed, and the layers that differ."""

from __future__ import annotations

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from expertyard.memory import GiB
from expertyard.plan.model import LayerPlan, Plan
from expertyard.rules.devices import device_order
from expertyard.rules.ranges import format_ids


def compare(first: Plan, second: Plan) -> RenderableType:
    """A table of what changes from the first plan to the second."""
    table = Table(box=None, header_style="bold", pad_edge=False)
    for title in ("", "this request", "what if", "change"):
        table.add_column(title, justify="left" if not title else "right", no_wrap=True)
    for device in sorted({*first.devices, *second.devices}, key=device_order):
        uses = [plan.devices.get(device) for plan in (first, second)]
        for kind, name in (
            ("used", "used GiB"),
            ("experts", "of it experts"),
            ("free", "free GiB"),
        ):
            cells = [getattr(use, kind) / GiB if use else 0.0 for use in uses]
            _row(table, f"{device} {name}", cells, ".2f")
        reads = [use.read_per_token / GiB if use else 0.0 for use in uses]
        _row(table, f"{device} GiB read/token", reads, ".3f")
    speeds = [
        1 / plan.seconds_per_token if plan.seconds_per_token else 0.0 for plan in (first, second)
    ]
    _row(table, "tokens/s that reading allows", speeds, ".1f")
    differ = [
        a.layer
        for a, b in zip(first.layers, second.layers, strict=False)
        if _places(a) != _places(b)
    ]
    text = f"layers placed otherwise: {format_ids(differ) or 'none'}"
    return Group(table, Text(text))


def _row(table: Table, name: str, cells: list[float], spec: str) -> None:
    change = cells[1] - cells[0]
    table.add_row(name, *(format(cell, spec) for cell in cells), format(change, "+" + spec))


def _places(layer: LayerPlan) -> object:
    return layer.device, [(g.ids, g.device, g.format) for g in layer.experts or ()]
