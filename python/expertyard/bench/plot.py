# SPDX-License-Identifier: Apache-2.0
"""A picture of results: share of the roofline over tokens, a panel a shape and routing, a line a
kernel and format. From Results or from the JSON's rows; no plotting library.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any
from xml.sax.saxutils import escape

WIDTH, HEIGHT, LEFT, TOP, GAP, LEGEND = 360, 220, 52, 58, 76, 18
COLUMNS = 2
# Okabe and Ito's colours, which everyone can tell apart; yellow is left out on white
COLOURS = {
    "bf16": "#000000",
    "int8": "#0072b2",
    "int4": "#d55e00",
    "fp8": "#009e73",
    "mxfp4": "#cc79a7",
    "fp16": "#56b4e9",
    "fp32": "#e69f00",
}
DASHES = ("", "6 3", "2 3", "8 3 2 3")


def draw(rows: Iterable[Mapping[str, Any]], title: str = "") -> str:
    """The SVG document. rows: as in the JSON's "results"."""
    rows = list(rows)
    panels: dict[tuple[str, str], list[Mapping[str, Any]]] = {}
    for row in rows:
        panels.setdefault((row["shape"], row["routing"]), []).append(row)
    series = _series(rows)
    columns = min(COLUMNS, max(1, len(panels)))
    lines_of_panels = math.ceil(len(panels) / columns)
    per_line = max(1, columns * (WIDTH + LEFT) // 190)
    legend = math.ceil(len(series) / per_line) * LEGEND
    width = columns * (WIDTH + LEFT) + 24
    height = TOP + lines_of_panels * (HEIGHT + GAP) + legend + 8
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" '
        f'width="{width}" height="{height}" font-family="sans-serif" font-size="11">',
        f'<rect width="{width}" height="{height}" fill="white"/>',
        f'<text x="12" y="20" font-size="14">{escape(title or "Share of what is possible")}</text>',
    ]
    for index, ((shape, routing), of_panel) in enumerate(panels.items()):
        x = LEFT + index % columns * (WIDTH + LEFT)
        y = TOP + index // columns * (HEIGHT + GAP)
        parts += _panel(f"{shape}, {routing} routing", of_panel, series, x, y)
    top = TOP + lines_of_panels * (HEIGHT + GAP)
    for index, (key, style) in enumerate(series.items()):
        x, y = LEFT + index % per_line * 190, top + index // per_line * LEGEND
        parts.append(
            f'<line x1="{x}" y1="{y}" x2="{x + 26}" y2="{y}" {style} stroke-width="2"/>'
            f'<text x="{x + 32}" y="{y + 4}">{escape(key)}</text>'
        )
    return "\n".join([*parts, "</svg>"]) + "\n"


def _name(row: Mapping[str, Any]) -> str:
    packed = row["kernel"].startswith(f"{row['format']}_packed")
    return " ".join([row["format"], row["mode"], *(["packed"] if packed else [])])


def _series(rows: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """Name -> SVG attributes of its line: a colour a format, dashes among its variants."""
    used: dict[str, int] = {}
    out: dict[str, str] = {}
    for row in rows:
        name, base = _name(row), row["format"].partition("-")[0]
        if name not in out:
            dash = DASHES[used.get(base, 0) % len(DASHES)]
            used[base] = used.get(base, 0) + 1
            colour = COLOURS.get(base, "#666666")
            out[name] = f'stroke="{colour}" fill="none" stroke-dasharray="{dash}"'
    return out


def _panel(
    title: str, rows: Sequence[Mapping[str, Any]], series: Mapping[str, str], x: int, y: int
) -> list[str]:
    counts = sorted({row["num_tokens"] for row in rows})
    low, high = math.log2(counts[0]), math.log2(counts[-1])
    top_share = max(1.0, *(row["r_roof"] for row in rows))

    def across(count: int) -> float:
        return x + 10 + (WIDTH - 30) * ((math.log2(count) - low) / ((high - low) or 1))

    def up(share: float) -> float:
        return float(y + HEIGHT * (1 - share / top_share))

    parts = [f'<text x="{x}" y="{y - 10}" font-size="12" font-weight="bold">{escape(title)}</text>']
    for percent in range(0, 101, 20):
        at = up(percent / 100)
        parts.append(
            f'<line x1="{x}" y1="{at:.1f}" x2="{x + WIDTH - 10}" y2="{at:.1f}" '
            f'stroke="{"#888888" if percent in (0, 100) else "#dddddd"}"/>'
            f'<text x="{x - 6}" y="{at + 4:.1f}" text-anchor="end">{percent} %</text>'
        )
    for count in counts:
        parts.append(
            f'<text x="{across(count):.1f}" y="{y + HEIGHT + 16}" text-anchor="middle">{count}'
            "</text>"
        )
    parts.append(
        f'<text x="{x + WIDTH / 2:.1f}" y="{y + HEIGHT + 31}" text-anchor="middle">tokens</text>'
    )
    for name, style in series.items():
        points = sorted((row["num_tokens"], row["r_roof"]) for row in rows if _name(row) == name)
        if not points:
            continue
        path = " ".join(f"{across(count):.1f},{up(share):.1f}" for count, share in points)
        parts.append(f'<polyline points="{path}" {style} stroke-width="2"/>')
        fill = style.split('"')[1]
        parts += [
            f'<circle cx="{across(count):.1f}" cy="{up(share):.1f}" r="3" fill="{fill}"/>'
            for count, share in points
        ]
    return parts
