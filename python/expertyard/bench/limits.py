# SPDX-License-Identifier: Apache-2.0
"""This machine's limits, measured now, with the instructions that the kernels use."""

import statistics

import torch

from ..native import _C

_BUFFER_BYTES = 512 << 20  # far more than any L3
_READ_BYTES = 64 << 20  # a thread, and a probe: some milliseconds


class Limits:
    """Probes for one kernel on num_threads threads. Holds 512 MiB while it lives."""

    def __init__(self, kernel: str, num_threads: int) -> None:
        self.kernel, self.num_threads = kernel, num_threads
        self._buffer = torch.ones(_BUFFER_BYTES, dtype=torch.uint8)
        self._next = 0

    def read_gbps(self) -> float:
        """GB/s (1e9) of reading memory that is in no cache."""
        size = min(_READ_BYTES * self.num_threads, _BUFFER_BYTES)
        if self._next + size > _BUFFER_BYTES:
            self._next = 0
        address = self._buffer.data_ptr() + self._next
        self._next += size
        return float(_C.read_gbps(self.kernel, address, size, self.num_threads))

    def peak_gflops(self) -> float:
        """GFLOP/s of the kernel's multiply-add in registers, a multiply-add counted as two."""
        return float(_C.peak_gflops(self.kernel, self.num_threads))


def summary(num_threads: int) -> dict[str, float | None]:
    """The limits by name; None where this CPU has no such instruction. Medians of seven."""
    runnable = {k["name"]: k for k in _C.kernels() if k["runnable"]}

    def peak(name: str) -> float | None:
        if name not in runnable:
            return None
        return statistics.median(_C.peak_gflops(name, num_threads) for _ in range(7))

    best = max(runnable.values(), key=lambda k: k["rank"])["name"]
    limits = Limits(best, num_threads)
    fma = max((k for k in runnable.values() if not k["bf16_inputs"]), key=lambda k: k["rank"])
    return {
        "read_gbps": statistics.median(limits.read_gbps() for _ in range(15)),
        "bf16_gflops": peak("bf16_avx512_bf16"),
        "int8_gops": None,
        "fma_gflops": peak(fma["name"]),
    }
