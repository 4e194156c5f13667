# SPDX-License-Identifier: Apache-2.0
"""The card's own limits: what shares are shares of."""

import ctypes
import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from .timing import graph_seconds

BYTES = 1 << 30
PROBE = Path(__file__).with_name("probe.cu")
CUDA_SOURCES = Path(__file__).resolve().parents[2] / "csrc" / "cuda"


def flags(major: int, minor: int) -> list[str]:
    """nvcc's, for probe.cu and a card of that capability."""
    name = f"{major}{minor}" + ("a" if major == 9 else "")
    return [
        "-O3", "-std=c++17", f"-gencode=arch=compute_{name},code=sm_{name}", f"-I{CUDA_SOURCES}",
        *(["-DEXPERTYARD_HOPPER=1"] if major == 9 else []),
    ]  # fmt: skip


def ceilings(properties: Any) -> dict[str, Callable[[], float]]:
    probe = _Probe(properties)
    hopper = {"wgmma_bf16_tflops": probe.wgmma} if properties.major == 9 else {}
    return {
        "copy_tb_per_s": _copy,
        "read_tb_per_s": probe.read,
        "mma_sync_bf16_tflops": probe.mma_sync,
        **hopper,
        "matmul_bf16_tflops": _matmul,
        "empty_kernel_in_graph_us": _gap,
    }


def _copy() -> float:
    a = torch.randint(0, 255, (BYTES,), dtype=torch.uint8, device="cuda")
    b = torch.empty_like(a)
    return 2 * BYTES / graph_seconds([lambda: b.copy_(a)] * 4) / 1e12


def _matmul() -> float:
    n = 8192
    a, b = (torch.randn(n, n, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    c = torch.empty_like(a)
    return 2 * n**3 / graph_seconds([lambda: torch.mm(a, b, out=c)] * 4) / 1e12


def _gap() -> float:
    x = torch.zeros(1, device="cuda")
    return graph_seconds([lambda: x.add_(1)] * 200) * 1e6


class _Probe:
    """probe.cu, compiled for this card when it is first asked."""

    def __init__(self, properties: Any) -> None:
        self._properties = properties
        self._library: ctypes.CDLL | None = None

    def _load(self) -> ctypes.CDLL:
        if self._library is None:
            nvcc = os.environ.get("CUDACXX") or shutil.which("nvcc") or "/usr/local/cuda/bin/nvcc"
            out = Path(tempfile.mkdtemp()) / "probe.so"
            subprocess.run(
                [nvcc, *flags(self._properties.major, self._properties.minor), "-shared",
                 "-Xcompiler=-fPIC", str(PROBE), "-o", str(out)],
                check=True, capture_output=True, timeout=120,
            )  # fmt: skip
            self._library = ctypes.CDLL(str(out))
        return self._library

    def _flops(self, name: str) -> float:
        function = getattr(self._load(), name)
        function.restype = ctypes.c_double
        return _positive(function()) / 1e12

    def read(self) -> float:
        memory = torch.randint(0, 255, (BYTES,), dtype=torch.uint8, device="cuda")
        torch.cuda.synchronize()
        read_seconds = self._load().read_seconds
        read_seconds.restype = ctypes.c_double
        seconds = read_seconds(ctypes.c_void_p(memory.data_ptr()), ctypes.c_size_t(BYTES))
        return BYTES / _positive(seconds) / 1e12

    def mma_sync(self) -> float:
        return self._flops("mma_sync_flops")

    def wgmma(self) -> float:
        return self._flops("wgmma_flops")


def _positive(value: float) -> float:
    if value <= 0:
        raise RuntimeError(f"probe.cu: CUDA error {-value:.0f}")
    return value
