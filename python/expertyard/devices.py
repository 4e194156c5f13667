# SPDX-License-Identifier: Apache-2.0
"""What this machine has: the one place that asks it. Plans are made from what is returned here."""

from pathlib import Path

import torch
from torch import Tensor

from . import virtual
from .native import _C

__all__ = ["device_of", "machine_memory", "to_device", "torch_device", "unusable_devices"]

_CGROUPS = Path("/sys/fs/cgroup")


def machine_memory() -> dict[str, int]:
    """Bytes that are free now on each device that our kernels can use: "cuda:0", ..., "cpu"."""
    free = _free_ram()
    if count := virtual.number():
        memory = {f"cuda:{index}": virtual.capacity(free) for index in range(count)}
        return {**memory, "cpu": max(0, free - sum(memory.values()))}
    memory = {
        f"cuda:{index}": torch.cuda.mem_get_info(index)[0]
        for index in range(_gpus())
        if not _C.cuda_problem(index)
    }
    memory["cpu"] = free
    return memory


def unusable_devices() -> dict[str, str]:
    """GPUs that torch sees and our kernels cannot use, each with the reason."""
    if virtual.number():
        return {}
    problems = {f"cuda:{index}": str(_C.cuda_problem(index) or "") for index in range(_gpus())}
    return {device: problem for device, problem in problems.items() if problem}


def torch_device(name: str) -> torch.device:
    """torch's device for a plan's: a virtual GPU is a part of the CPU's memory."""
    return torch.device("cpu" if virtual.gpu(name) else name)


def device_of(tensor: Tensor) -> str:
    """The plan's name for where a tensor is, as far as it is known: see virtual.marked()."""
    return virtual.marked(tensor) or str(tensor.device)


def to_device(tensor: Tensor, name: str) -> Tensor:
    """The tensor on a plan's device: itself if it is there, else a copy.

    Raises torch.OutOfMemoryError if there is no room.
    """
    if not virtual.number():
        return tensor.to(name)
    if virtual.marked(tensor) == name:
        return tensor
    if (found := virtual.gpu(name)) is not None:
        return found.put(tensor)
    return virtual.mark(tensor.detach().clone(), name)


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
