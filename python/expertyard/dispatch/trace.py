# SPDX-License-Identifier: Apache-2.0
"""A timeline of the devices' work, in the format of Chrome's tracing (chrome://tracing, Perfetto).

One row a device. Off it costs one comparison a part. Work on a real GPU is timed with CUDA events,
and placed by an event that was recorded when the trace began.
"""

import json
import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from ..errors import ConfigError

__all__ = ["Tracer", "active", "tracing"]


@dataclass
class Tracer:
    """Spans as they end: (name, device, begin, end, what else), nanoseconds of perf_counter."""

    spans: list[tuple[str, str, int, int, dict[str, Any]]] = field(default_factory=list)
    began: int = field(default_factory=time.perf_counter_ns)
    _gpu: list[tuple[str, str, Any, Any, dict[str, Any]]] = field(default_factory=list)
    _first: dict[str, tuple[Any, int]] = field(default_factory=dict)

    def add(self, name: str, device: str, begin: int, end: int | None = None, **about: Any) -> None:
        """A span on the host's clock. end None: now."""
        end = time.perf_counter_ns() if end is None else end
        self.spans.append((name, device, begin, end, about))

    def gpu_begin(self, device: str) -> Any:
        """An event on the device's current stream."""
        if device not in self._first:
            torch.cuda.synchronize(device)
            event = _event(device)
            torch.cuda.synchronize(device)
            self._first[device] = event, time.perf_counter_ns()
        return _event(device)

    def gpu_end(self, name: str, device: str, begin: Any, **about: Any) -> None:
        self._gpu.append((name, device, begin, _event(device), about))

    def to_json(self) -> dict[str, Any]:
        """Chrome's trace: complete events, microseconds since the trace began."""
        spans = list(self.spans)
        for name, device, begin, end, about in self._gpu:
            first, zero = self._first[device]
            torch.cuda.synchronize(device)
            start = zero + int(first.elapsed_time(begin) * 1e6)
            spans.append((name, device, start, start + int(begin.elapsed_time(end) * 1e6), about))
        rows = {device: i for i, device in enumerate(dict.fromkeys(s[1] for s in spans))}
        process = os.getpid()
        events: list[dict[str, Any]] = [
            {"ph": "M", "name": "thread_name", "pid": process, "tid": row, "args": {"name": device}}
            for device, row in rows.items()
        ]
        for name, device, begin, end, about in spans:
            events.append(
                {
                    "ph": "X",
                    "name": name,
                    "pid": process,
                    "tid": rows[device],
                    "ts": (begin - self.began) / 1e3,
                    "dur": (end - begin) / 1e3,
                    "args": about,
                }
            )
        return {"traceEvents": events, "displayTimeUnit": "ms"}

    def together(self) -> float | None:
        """The share of its time that the CPU or the GPUs, whichever works less, works while the
        other one does too. None: one of them does not work at all."""
        events = list(self.to_json()["traceEvents"])
        names = {event["tid"]: event["args"]["name"] for event in events if event["ph"] == "M"}
        spans: dict[bool, list[tuple[float, float]]] = {True: [], False: []}
        for event in events:
            if event["ph"] == "X":
                span = event["ts"], event["ts"] + event["dur"]
                spans[names[event["tid"]] == "cpu"].append(span)
        cpu, gpus = _union(spans[True]), _union(spans[False])
        least = min(sum(end - begin for begin, end in busy) for busy in (cpu, gpus))
        if least <= 0:
            return None
        both = sum(max(0.0, min(a[1], b[1]) - max(a[0], b[0])) for a, b in _neighbours(cpu, gpus))
        return both / least

    def save(self, path: str | Path) -> None:
        """Writes the trace. Raises ConfigError if the file cannot be written."""
        try:
            Path(path).write_text(json.dumps(self.to_json()), encoding="utf-8")
        except OSError as error:
            raise ConfigError(f"{path}: cannot be written ({error.strerror}).") from None


def _union(spans: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """The same times, in order and without overlaps."""
    found: list[tuple[float, float]] = []
    for begin, end in sorted(spans):
        if found and begin <= found[-1][1]:
            found[-1] = found[-1][0], max(end, found[-1][1])
        else:
            found.append((begin, end))
    return found


def _neighbours(
    a: list[tuple[float, float]], b: list[tuple[float, float]]
) -> Iterator[tuple[tuple[float, float], tuple[float, float]]]:
    """Pairs among which are all that overlap; both lists are in order."""
    i = j = 0
    while i < len(a) and j < len(b):
        yield a[i], b[j]
        if a[i][1] < b[j][1]:
            i += 1
        else:
            j += 1


_active: Tracer | None = None
_one = threading.Lock()


def active() -> Tracer | None:
    """The tracer that is on, if any."""
    return _active


@contextmanager
def tracing() -> Iterator[Tracer]:
    """Records all layers' work of this process meanwhile. ConfigError if one is on already."""
    global _active
    if not _one.acquire(blocking=False):
        raise ConfigError("A trace is being recorded already.")
    try:
        _active = Tracer()
        yield _active
    finally:
        _active = None
        _one.release()


def _event(device: str) -> Any:
    event = torch.cuda.Event(enable_timing=True)
    event.record(torch.cuda.current_stream(device))
    return event
