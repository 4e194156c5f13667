# SPDX-License-Identifier: Apache-2.0
"""This machine's limits, measured now, with the instructions that the kernels use."""

import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..native import _C
from ..packing import aligned_bytes

_BUFFER_BYTES = 512 << 20  # at the least; four times the L3, if that is more
_WAKE_SECONDS = 0.008
_OPENMP_SECONDS = 0.05  # that torch's threads spin, and more
_READ_BYTES = 64 << 20  # a thread, and a probe: some milliseconds


def l3_bytes() -> int:
    """Bytes of the last-level cache of the first CPU; 32 MiB where the system does not say."""
    folders = Path("/sys/devices/system/cpu/cpu0/cache").glob("index*")
    try:
        last = max(folders, key=lambda f: int((f / "level").read_text()))
        text = (last / "size").read_text().strip()
    except (OSError, ValueError):
        return 32 << 20
    unit = {"K": 1 << 10, "M": 1 << 20}.get(text[-1], 1)
    return int(text.rstrip("KM")) * unit


class Limits:
    """Probes on num_threads threads. Holds a buffer of 512 MiB or more while it lives."""

    def __init__(self, num_threads: int) -> None:
        self.num_threads = num_threads
        self._cache = l3_bytes()
        size = max(_BUFFER_BYTES, 4 * self._cache)
        self._buffer = aligned_bytes(size)  # in huge pages, as packed weights are
        self._buffer.fill_(1)
        self._next = 0
        self._reader = _best(lambda kernel: True)["name"]

    def read_gbps(self) -> float:
        """GB/s (1e9) of reading memory that is in no cache."""
        size = min(_READ_BYTES * self.num_threads, self._buffer.numel())
        if self._next + size > self._buffer.numel():
            self._next = 0
        address = self._buffer.data_ptr() + self._next
        self._next += size
        return float(_C.read_gbps(self._reader, address, size, self.num_threads))

    def evict(self) -> None:
        """Fills the caches with something else."""
        size = min(2 * self._cache, self._buffer.numel())
        _C.read_gbps(self._reader, self._buffer.data_ptr(), size, self.num_threads)

    def settle(self, seconds: float) -> None:
        """Waits until others' threads, which spin for milliseconds, are asleep; wakes ours.

        Ours must not meet them: they would share a CPU for tens of milliseconds. Nor may the cores
        sleep: those come back slow, and that would be measured too.
        """
        end = time.perf_counter() + seconds
        while time.perf_counter() < end:
            pass
        self.evict()
        end = time.perf_counter() + _WAKE_SECONDS
        while time.perf_counter() < end:
            self.read_gbps()

    def peak_gflops(self, kernel: str) -> float:
        """GFLOP/s of a kernel's multiply-add in registers, a multiply-add counted as two."""
        return float(_C.peak_gflops(kernel, self.num_threads))

    def dispatch_us(self) -> float:
        """Microseconds of a meeting of own workers (not PyTorch's), back to back; the median."""
        return statistics.median(float(_C.dispatch_us(self.num_threads)) for _ in range(15))

    def summary(self) -> dict[str, float | None]:
        """The limits by name; None where this CPU has no such instruction. Medians.

        read_gbps    reading memory
        bf16_gflops  vdpbf16ps
        int8_gops    vpdpbusd, or what the best room has for int8 in mode fast
        fma_gflops   fp32 multiply-add of the widest vectors
        """

        def peak(serves: Callable[[dict[str, Any]], bool]) -> float | None:
            try:
                kernel = _best(serves)["name"]
            except ValueError:
                return None
            return statistics.median(self.peak_gflops(kernel) for _ in range(7))

        self.settle(_OPENMP_SECONDS)
        return {
            "read_gbps": statistics.median(self.read_gbps() for _ in range(15)),
            "bf16_gflops": peak(lambda k: k["bf16_inputs"]),
            "int8_gops": peak(
                lambda k: k["mode"] == "fast" and k["format"] == "int8" and k["rank"] > 0
            ),
            "fma_gflops": peak(lambda k: k["mode"] == "exact" and not k["bf16_inputs"]),
        }


def _best(serves: Callable[[dict[str, Any]], bool]) -> dict[str, Any]:
    """The fastest room's kernel of those that this CPU can run. ValueError if there is none."""
    fit = (k for k in _C.kernels() if k["runnable"] and serves(k))
    return max(fit, key=lambda kernel: int(kernel["rank"]))
