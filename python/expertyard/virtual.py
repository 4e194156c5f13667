# SPDX-License-Identifier: Apache-2.0
"""Virtual GPUs: with EXPERTYARD_VIRTUAL_GPUS=N a plan's cuda:0 .. cuda:N-1 are parts of this
machine's RAM, so that every split, transfer and move runs on a machine without a GPU.

To torch their tensors are on the CPU. What is put on a virtual GPU is a copy of its own, counted
against the GPU's memory and marked with its name; `Guard` follows the marks through every torch
operation and refuses one that mixes two devices, as CUDA would. Not a simulation of speed.
"""

import os
import threading
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from .errors import ConfigError, DeviceError
from .memory import parse_size

__all__ = ["COUNT", "MEMORY", "Guard", "VirtualGpu", "at", "gpu", "mark", "marked", "number"]

COUNT = "EXPERTYARD_VIRTUAL_GPUS"
MEMORY = "EXPERTYARD_VIRTUAL_GPU_MEMORY"  # of each; default: an even share of what is free
MOST = 64
_MARK = "_expertyard_device"
_gpus: dict[str, "VirtualGpu"] = {}


def number() -> int:
    """How many virtual GPUs there are. Raises ConfigError if the variable is no number."""
    text = os.environ.get(COUNT, "")
    if not text:
        return 0
    if not text.isdecimal() or int(text) > MOST:
        raise ConfigError(f"{COUNT}: expected a number from 0 to {MOST}, got {text!r}.")
    return int(text)


def capacity(free_ram: int) -> int:
    """Bytes of each virtual GPU. Raises ConfigError."""
    text = os.environ.get(MEMORY, "")
    return parse_size(text, MEMORY) if text else free_ram // (number() + 1)


class VirtualGpu:
    """Memory with a name and a limit.

    used  bytes of the tensors that are there now
    """

    def __init__(self, name: str, limit: int | None) -> None:
        self.name, self.limit, self.used = name, limit, 0
        self._lock = threading.Lock()

    def put(self, tensor: Tensor) -> Tensor:
        """A copy of `tensor` on this device. Raises torch.OutOfMemoryError beyond the limit."""
        return mark(self.own(tensor.detach().clone(memory_format=torch.contiguous_format)), self)

    def own(self, tensor: Tensor) -> Tensor:
        """Counts memory that was allocated for this device; gives it back when it is freed."""
        storage = tensor.untyped_storage()
        size = storage.nbytes()
        with self._lock:
            if self.limit is not None and self.used + size > self.limit:
                raise torch.OutOfMemoryError(
                    f"{self.name} (virtual): {size} bytes are needed, {self.used} of {self.limit} "
                    "are in use."
                )
            self.used += size
        weakref.finalize(storage, self._freed, size)
        return tensor

    def _freed(self, size: int) -> None:
        with self._lock:
            self.used -= size


def gpu(name: str) -> VirtualGpu | None:
    """The virtual GPU of that name, None if it is not virtual."""
    if not name.startswith("cuda:") or int(name[5:]) >= number():
        return None
    text = os.environ.get(MEMORY, "")
    limit = parse_size(text, MEMORY) if text else None
    found = _gpus.setdefault(name, VirtualGpu(name, limit))
    found.limit = limit
    return found


def mark(tensor: Tensor, device: "VirtualGpu | str") -> Tensor:
    """Says where a tensor is; returns it."""
    setattr(tensor, _MARK, device if isinstance(device, str) else device.name)
    return tensor


def marked(tensor: Tensor) -> str | None:
    """Where a tensor was said to be; None: nobody knows, as of a tensor that torch has made."""
    found: str | None = tensor.__dict__.get(_MARK)
    return found


class Guard(TorchDispatchMode):
    """While it is entered, every result is marked with its inputs' device, and an operation on
    tensors of two devices raises DeviceError: a transfer was forgotten.

    home  where new tensors are that are made of nothing, as torch.arange: the device of the module
          that runs (see at()), first this one. Single numbers may be anywhere, as on real GPUs.
    """

    def __init__(self, home: str) -> None:
        super().__init__()
        self.home = home

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        inputs = [t for t in _tensors((args, kwargs)) if t.dim() > 0]
        places = {place for t in inputs if (place := marked(t)) is not None}
        name = func.name() if hasattr(func, "name") else str(func)
        moves = name in ("aten::copy_", "aten::_to_copy")
        if len(places) > 1 and not moves:
            raise DeviceError(f"{name}: expected tensors of one device, got {sorted(places)}.")
        out = func(*args, **kwargs)
        if name == "aten::copy_":
            place = marked(args[0])
        elif name == "aten::_to_copy" and kwargs.get("device") is not None:
            place = None  # an explicit move, to a place that torch's name for it does not tell
        elif inputs:
            place = next(iter(places), None)
        else:
            place = _current.get(threading.get_ident(), self.home)
        if place is not None:
            for tensor in _tensors(out):
                mark(tensor, place)
        return out


_current: dict[int, str] = {}  # thread -> device of the module that runs in it


@contextmanager
def at(device: str) -> Iterator[None]:
    """New tensors that are made of nothing are on `device` meanwhile."""
    before = enter(device)
    try:
        yield
    finally:
        leave(before)


def enter(device: str) -> str | None:
    """Begins what at() does; returns what leave() needs."""
    thread = threading.get_ident()
    before = _current.get(thread)
    _current[thread] = device
    return before


def leave(before: str | None) -> None:
    thread = threading.get_ident()
    if before is None:
        _current.pop(thread, None)
    else:
        _current[thread] = before


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _tensors(item)
    elif isinstance(value, dict):
        for item in value.values():
            yield from _tensors(item)
