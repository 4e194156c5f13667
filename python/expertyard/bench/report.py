# SPDX-License-Identifier: Apache-2.0
"""The benchmark's report: what machine it was, a table, and the JSON."""

import os
import platform
from collections.abc import Sequence
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
        "threads": dict(_C.thread_limits()),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "system": f"{platform.system()} {platform.release()}",
        "load_average": os.getloadavg()[0],
        "expertyard": __version__,
        "torch": torch.__version__,
        "transformers": peers,
        "compiler": _C.build["compiler"],
    }


def to_json(
    results: Sequence[Result], limits: dict[str, float | None], about: dict[str, Any]
) -> dict[str, Any]:
    return {
        "schema": SCHEMA,
        "machine": about,
        "limits": limits,
        "results": [result.to_json() for result in results],
    }


def to_table(results: Sequence[Result]) -> Table:
    """One row a result; a peer's column says how many times as long as ours it takes."""
    peers = list(dict.fromkeys(name for result in results for name in result.peers))
    table = Table(box=None, pad_edge=False)
    for heading in ("shape", "kernel"):
        table.add_column(heading)
    numbers = ("T", "ms", "GB/s", "GFLOP/s", "of read", "of peak", "of roof")
    for heading in (*numbers, *(f"{peer} /ours" for peer in peers)):
        table.add_column(heading, justify="right")
    for r in results:
        table.add_row(
            r.shape,
            r.kernel,
            str(r.num_tokens),
            f"{r.median_ms:.2f}",
            f"{r.gbps:.1f}",
            f"{r.gflops:.0f}",
            f"{r.r_mem:.0%}",
            f"{r.r_cmp:.0%}",
            f"{r.r_roof:.0%}",
            *(f"{r.peers[p]:.2f}" if p in r.peers else "" for p in peers),
        )
    return table
