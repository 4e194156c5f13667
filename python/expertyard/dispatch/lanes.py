# SPDX-License-Identifier: Apache-2.0
"""Threads that work for a device while the caller does something else.

A lane is one thread with a queue, asleep when it has nothing to do. A virtual GPU is a lane that
computes on one core: the counterpart of a CUDA stream. An exception in a job comes out of wait(); a
job that does not end in time is a DeviceError, and its lane takes no further work.
"""

import os
import queue
import threading
from collections.abc import Callable
from typing import Any

import torch

from ..errors import DeviceError
from ..native import _C

__all__ = ["Ticket", "submit"]


class Ticket:
    """A job that was handed in."""

    __slots__ = ("_arguments", "_done", "_error", "_function", "_result", "lane")

    def __init__(self, lane: "_Lane", function: Callable[..., Any], arguments: tuple[Any, ...]):
        self.lane = lane
        self._function, self._arguments = function, arguments
        self._done = threading.Lock()
        self._done.acquire()
        self._result: Any = None
        self._error: BaseException | None = None

    def run(self) -> None:
        try:
            self._result = self._function(*self._arguments)
        except BaseException as error:
            self._error = error
        self._arguments = ()
        self._done.release()

    def wait(self, seconds: float, what: str) -> Any:
        """The job's result, or its exception. DeviceError after `seconds`; what: for the message"""
        if not self._done.acquire(timeout=seconds):
            self.lane.stuck = what
            raise DeviceError(
                f"{self.lane.name}: {what} did not finish within {seconds:g} s. The device hangs, "
                "or the time is too short for such a call: ExpertsConfig(timeout=SECONDS)."
            )
        self._done.release()  # it may be asked again
        if self._error is not None:
            raise self._error
        return self._result

    def join(self, seconds: float) -> None:
        """Waits until the job has run, whatever came of it."""
        if self._done.acquire(timeout=seconds):
            self._done.release()


class _Lane:
    def __init__(self, name: str) -> None:
        self.name = name
        self.stuck = ""
        self._jobs: queue.SimpleQueue[Ticket] = queue.SimpleQueue()
        threading.Thread(target=self._serve, name=f"expertyard {name}", daemon=True).start()

    def submit(self, function: Callable[..., Any], *arguments: Any) -> Ticket:
        if self.stuck:
            raise DeviceError(
                f"{self.name}: still busy with {self.stuck}, which did not finish in time. Nothing "
                "more can be given to it; start the process again."
            )
        ticket = Ticket(self, function, arguments)
        self._jobs.put(ticket)
        return ticket

    def _serve(self) -> None:
        if self.name != "cpu":
            _C.limit_caller(1)
        torch.set_grad_enabled(False)
        while True:
            self._jobs.get().run()


_lanes: dict[str, _Lane] = {}
_making = threading.Lock()


def submit(device: str, function: Callable[..., Any], *arguments: Any) -> Ticket:
    """Has the device's lane call the function. DeviceError if the lane hangs."""
    lane = _lanes.get(device)
    if lane is None:
        with _making:
            lane = _lanes.setdefault(device, _lanes.get(device) or _Lane(device))
    return lane.submit(function, *arguments)


def _forget() -> None:
    """In a forked child: its parent's threads are not there."""
    global _making
    _lanes.clear()
    _making = threading.Lock()


os.register_at_fork(after_in_child=_forget)
