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


def ceilings(properties: Any) -> dict[str, Callable[[], float]]:
    probe = _Probe(properties)
    return {
        "copy_tb_per_s": _copy,
        "read_tb_per_s": probe.read,
        "mma_sync_bf16_tflops": probe.mma_sync,
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
            p = self._properties
            out = Path(tempfile.mkdtemp()) / "probe.so"
            code = f"arch=compute_{p.major}{p.minor},code=sm_{p.major}{p.minor}"
            source = str(Path(__file__).with_name("probe.cu"))
            subprocess.run(
                [nvcc, "-O3", "-std=c++17", "-shared", "-Xcompiler=-fPIC", f"-gencode={code}",
                 source, "-o", str(out)], check=True, capture_output=True, timeout=120,
            )  # fmt: skip
            self._library = ctypes.CDLL(str(out))
            for name in ("read_seconds", "mma_sync_flops"):
                getattr(self._library, name).restype = ctypes.c_double
        return self._library

    def read(self) -> float:
        memory = torch.randint(0, 255, (BYTES,), dtype=torch.uint8, device="cuda")
        torch.cuda.synchronize()
        seconds = self._load().read_seconds(
            ctypes.c_void_p(memory.data_ptr()), ctypes.c_size_t(BYTES)
        )
        return BYTES / _positive(seconds) / 1e12

    def mma_sync(self) -> float:
        return _positive(self._load().mma_sync_flops()) / 1e12


def _positive(value: float) -> float:
    if value <= 0:
        raise RuntimeError(f"probe.cu: CUDA error {-value:.0f}")
    return value
