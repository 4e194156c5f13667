# SPDX-License-Identifier: Apache-2.0
"""What this machine has: the one place that asks it. Plans are made from what is returned here."""

from pathlib import Path

import torch

from .native import _C

__all__ = ["machine_memory", "unusable_devices"]

_CGROUP = Path("/sys/fs/cgroup")


def machine_memory() -> dict[str, int]:
    """Bytes that are free now on each device that our kernels can use: "cuda:0", ..., "cpu"."""
    memory = {
        f"cuda:{index}": torch.cuda.mem_get_info(index)[0]
        for index in range(_gpus())
        if not _C.cuda_problem(index)
    }
    memory["cpu"] = _free_ram()
    return memory


def unusable_devices() -> dict[str, str]:
    """GPUs that torch sees and our kernels cannot use, each with the reason."""
    problems = {f"cuda:{index}": str(_C.cuda_problem(index) or "") for index in range(_gpus())}
    return {device: problem for device, problem in problems.items() if problem}


def _gpus() -> int:
    return torch.cuda.device_count() if torch.cuda.is_available() else 0


def _free_ram() -> int:
    """MemAvailable, or what the control group leaves of its limit, whichever is less."""
    free = [_mem_available()]
    for limit, used in (
        (_CGROUP / "memory.max", _CGROUP / "memory.current"),
        (_CGROUP / "memory/memory.limit_in_bytes", _CGROUP / "memory/memory.usage_in_bytes"),
    ):
        try:
            free.append(max(0, int(limit.read_text()) - int(used.read_text())))
        except (OSError, ValueError):  # no such control group, or the word "max": no limit
            continue
    return min(free)


def _mem_available() -> int:
    for line in Path("/proc/meminfo").read_text().splitlines():
        name, _, rest = line.partition(":")
        if name == "MemAvailable":
            return int(rest.split()[0]) * 1024
    raise RuntimeError("/proc/meminfo has no MemAvailable line")
