# SPDX-License-Identifier: Apache-2.0
"""Tests start Python processes of their own: those find the package where this one has found it."""

import ctypes
import gc
import os
from pathlib import Path

import pytest

import expertyard
from expertyard import virtual

_package = str(Path(expertyard.__file__).resolve().parents[1])
os.environ["EXPERTYARD_CROSSOVERS"] = os.devnull  # what this machine has measured is no matter
os.environ["PYTHONPATH"] = os.pathsep.join(
    p for p in (_package, os.environ.get("PYTHONPATH", "")) if p
)

_PAGE, _MOST_BYTES = os.sysconf("SC_PAGESIZE"), 2 << 30


def pytest_runtest_teardown() -> None:
    """Gives back what the C library keeps of freed memory: thousands of small layers, of every
    size, and poison between them would come to 12 GB."""
    resident = int(Path("/proc/self/statm").read_text().split()[1]) * _PAGE
    if resident > _MOST_BYTES and hasattr(libc := ctypes.CDLL(None), "malloc_trim"):
        gc.collect()
        libc.malloc_trim(0)


@pytest.fixture(autouse=True)
def _gpus_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """A test's virtual GPUs are empty, whatever other tests have left on theirs."""
    monkeypatch.setattr(virtual, "_gpus", {})
