# SPDX-License-Identifier: Apache-2.0
"""The benchmark's report: what machine it was, tables, and the JSON."""

import os
import platform
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from rich.table import Table

from .. import __version__
from ..native import _C
from .measure import Result

SCHEMA = 1


def machine() -> dict[str, Any]:
    """What a figure needs beside it to mean anything."""
    model = "unknown"
    with open("/proc/cpuinfo", encoding="utf-8") as lines:
        for line in lines:
            if line.startswith("model name"):
                model = line.split(":", 1)[1].strip()
                break
    try:
        import transformers

        peers = transformers.__version__
    except ImportError:
        peers = None
    return {
        "cpu": model,
        "features": [name for name, has in _C.cpu_features().items() if has],
        "threads": {**_C.thread_limits(), "team": _C.team()},
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "system": f"{platform.system()} {platform.release()}",
        "load_average": os.getloadavg()[0],
        "expertyard": __version__,
        "torch": torch.__version__,
        "transformers": peers,
        "compiler": _C.build["compiler"],
    }


def busy(num_threads: int) -> str | None:
    """A sentence of warning if others seem to use this machine, by its load of the last minute."""
    load = os.getloadavg()[0]
    spare = (os.cpu_count() or 1) - num_threads
    if load <= max(0.5, spare):
        return None
    return (
        f"the load of the last minute is {load:.1f}: others use this machine, and every figure "
        "below is worse for it"
    )


def stolen_seconds() -> float:
    """CPU seconds that the host gave to others while this machine wanted them, since its start."""
    with open("/proc/stat", encoding="utf-8") as lines:
        fields = lines.readline().split()
    return int(fields[8]) / os.sysconf("SC_CLK_TCK") if len(fields) > 8 else 0.0


def to_json(
    results: Sequence[Result],
    limits: Mapping[str, float | None],
    about: Mapping[str, Any],
    absent: Mapping[str, str] | None = None,
) -> dict[str, Any]:
    """absent: peer -> why it was not measured."""
    return {
        "schema": SCHEMA,
        "machine": dict(about),
        "limits": dict(limits),
        "results": [result.to_json() for result in results],
        "absent": dict(absent or {}),
    }


def to_table(results: Sequence[Result], title: str | None = None) -> Table:
    """One row a result; a peer's column says how many times as long as ours it takes."""
    peers = list(dict.fromkeys(name for result in results for name in result.peers))
    routings = {result.routing for result in results}
    table = Table(box=None, pad_edge=False, title=title, title_justify="left", title_style="bold")
    table.add_column("kernel", no_wrap=True)
    if len(routings) > 1:
        table.add_column("routing", no_wrap=True)
    numbers = ("T", "ms", "GB/s", "GFLOP/s", "of read", "of peak", "of roof")
    for heading in (*numbers, *(f"{_words(peer)} /ours" for peer in peers)):
        table.add_column(heading, justify="right", vertical="bottom")
    before = None
    for r in sorted(results, key=lambda r: (r.routing, r.num_tokens)):
        if before not in (None, (r.routing, r.num_tokens)) and len({x.kernel for x in results}) > 1:
            table.add_section()
        before = (r.routing, r.num_tokens)
        table.add_row(
            r.kernel,
            *([r.routing] if len(routings) > 1 else []),
            str(r.num_tokens),
            f"{r.median_ms:.2f}",
            f"{r.gbps:.1f}",
            f"{r.gflops:.0f}",
            f"{r.r_mem:.0%}",
            f"{r.r_cmp:.0%}",
            f"{r.r_roof:.0%}",
            *(_times(r.peers[p]) if p in r.peers else "" for p in peers),
        )
    return table


def _times(ratio: float) -> str:
    return f"{ratio:.2f}" if ratio < 10 else f"{ratio:.1f}" if ratio < 100 else f"{ratio:.0f}"


def _words(peer: str) -> str:
    """Narrow columns: a name breaks where it has an underscore."""
    return peer.replace("_", " ")


LEGEND = (
    "of read: bytes of the chosen experts / time / read bandwidth; of peak: operations / time / "
    "peak of the kernel's own multiply-add; of roof: the larger of the two ideal times / time; "
    "X /ours: how many times as long X takes. Medians, probes of the limits in between."
)
