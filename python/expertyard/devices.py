# SPDX-License-Identifier: Apache-2.0
"""What this machine has: the one place that asks it. Plans are made from what is returned here."""

from pathlib import Path

import torch

from .native import _C

__all__ = ["machine_memory", "unusable_devices"]

_CGROUPS = Path("/sys/fs/cgroup")


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
    """MemAvailable, or what a control group leaves of its limit, whichever is less."""
    free = [_mem_available()]
    for folder in _control_groups():
        for limit, used, cache in (
            ("memory.max", "memory.current", "inactive_file"),
            ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
        ):
            try:
                left = int((folder / limit).read_text()) - int((folder / used).read_text())
                left += _field(folder / "memory.stat", cache)  # given back when memory is short
            except (OSError, ValueError):  # no such control group, or the word "max": no limit
                continue
            free.append(max(0, left))
    return min(free)


def _control_groups() -> list[Path]:
    """The folders of this process's control groups for memory, and of those around them."""
    found: list[Path] = []
    try:
        lines = Path("/proc/self/cgroup").read_text().splitlines()
    except OSError:
        return found
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers and "memory" not in controllers.split(","):
            continue
        root = _CGROUPS / "memory" if controllers else _CGROUPS
        inner = root / path.strip("/")
        # inside a container the path may be the host's: then only the root is there
        found += [folder for folder in (inner, *inner.parents) if folder.is_relative_to(root)]
    return found


def _field(file: Path, name: str) -> int:
    """The number after `name` in a file of `name number` lines."""
    for line in file.read_text().splitlines():
        key, _, value = line.partition(" ")
        if key == name:
            return int(value)
    return 0


def _mem_available() -> int:
    for line in Path("/proc/meminfo").read_text().splitlines():
        name, _, rest = line.partition(":")
        if name == "MemAvailable":
            return int(rest.split()[0]) * 1024
    raise RuntimeError("/proc/meminfo has no MemAvailable line")
