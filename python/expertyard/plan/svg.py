# SPDX-License-Identifier: Apache-2.0
"""A picture of a plan: one row a device, one column a layer.

A cell's lower strip says that the layer's attention lives there; above it stands the share of the
layer's experts that this device has, the most popular at the bottom and darkest.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from xml.sax.saxutils import escape

from expertyard.memory import GiB
from expertyard.plan.model import LayerPlan, Plan
from expertyard.rules.devices import device_order

CELL, ROW, STRIP, LEFT, TOP = 14, 96, 8, 150, 34
SHADES = 6  # steps of popularity that an eye can tell apart


def draw(plan: Plan, popularity: Mapping[int, Sequence[float]] | None = None) -> str:
    """The SVG document. `popularity`: layer -> weight per expert; without it one shade."""
    devices = sorted(plan.devices, key=device_order)
    width, height = LEFT + CELL * plan.num_layers + 10, TOP + (ROW + 8) * len(devices) + 24
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" '
        f'width="{width}" height="{height}" font-family="sans-serif" font-size="11">',
        f'<rect width="{width}" height="{height}" fill="white"/>',
        f'<text x="10" y="18" font-size="14">{escape(plan.model)}: {plan.num_layers} layers</text>',
    ]
    for row, device in enumerate(devices):
        top = TOP + row * (ROW + 8)
        parts += _label(plan, device, top)
        for layer in plan.layers:
            parts += _cell(layer, device, LEFT + CELL * layer.layer, top, popularity or {})
    bottom = TOP + (ROW + 8) * len(devices) + 10
    for number in range(0, plan.num_layers, 5):
        parts.append(f'<text x="{LEFT + CELL * number}" y="{bottom}">{number}</text>')
    return "\n".join([*parts, "</svg>"]) + "\n"


def _label(plan: Plan, device: str, top: int) -> list[str]:
    use = plan.devices[device]
    size = (
        f"{use.used / GiB:.1f}" + (f" of {use.capacity / GiB:.0f}" if use.capacity else "") + " GiB"
    )
    reads = f"{use.read_per_token / GiB:.2f} GiB a token"
    lines = ((18, device, "bold"), (34, size, "normal"), (50, reads, "normal"))
    return [
        f'<text x="10" y="{top + y}" font-weight="{weight}">{escape(text)}</text>'
        for y, text, weight in lines
    ]


def _cell(
    layer: LayerPlan, device: str, x: int, top: int, popularity: Mapping[int, Sequence[float]]
) -> list[str]:
    colour = "#b4541a" if device == "cpu" else "#1a5fb4"
    bottom = top + ROW
    parts = [
        f'<rect x="{x}" y="{top}" width="{CELL - 1}" height="{ROW}" fill="none" stroke="#ddd"/>'
    ]
    if layer.device == device:
        parts.append(
            f'<rect x="{x}" y="{bottom - STRIP}" width="{CELL - 1}" height="{STRIP}" fill="#333"/>'
        )
    ids = [expert for g in layer.experts or () if g.device == device for expert in g.ids]
    if not ids:
        return parts
    total = sum(len(g.ids) for g in layer.experts or ())
    high = float(bottom - STRIP)
    for shade, number in _shades(layer.layer, ids, popularity):
        size = (ROW - STRIP) * number / total
        high -= size
        parts.append(
            f'<rect x="{x}" y="{high:.2f}" width="{CELL - 1}" height="{size:.2f}" '
            f'fill="{colour}" fill-opacity="{shade:.2f}"><title>layer {layer.layer}: {number} of '
            f"{total} experts on {escape(device)}</title></rect>"
        )
    return parts


def _shades(
    layer: int, ids: Sequence[int], popularity: Mapping[int, Sequence[float]]
) -> list[tuple[float, int]]:
    """(opacity, experts) from popular to unpopular; one shade when nothing is known."""
    weights = popularity.get(layer)
    if weights is None:
        return [(0.55, len(ids))]
    most = max(weights) or 1.0
    steps: dict[int, int] = {}
    for expert in ids:
        step = min(int(SHADES * weights[expert] / most), SHADES - 1)
        steps[step] = steps.get(step, 0) + 1
    return [
        (0.15 + 0.85 * step / (SHADES - 1), n) for step, n in sorted(steps.items(), reverse=True)
    ]
