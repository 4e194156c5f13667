# SPDX-License-Identifier: Apache-2.0
"""A progress bar for bytes that are read: GiB of all, GiB/s, time left.

Nothing is drawn in the first two seconds, so short work stays silent.
"""

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    Progress,
    ProgressColumn,
    Task,
    TextColumn,
    TimeRemainingColumn,
)
from rich.text import Text

__all__ = ["Meter", "metered"]

_PATIENCE = 2.0  # seconds
_GIB = 1 << 30


class _Done(ProgressColumn):
    def render(self, task: Task) -> Text:
        return Text(f"{task.completed / _GIB:.2f} of {(task.total or 0) / _GIB:.2f} GiB")


class _Speed(ProgressColumn):
    def render(self, task: Task) -> Text:
        speed = task.finished_speed or task.speed
        return Text("" if speed is None else f"{speed / _GIB:.2f} GiB/s")


class Meter:
    """Counts bytes; may be told from several threads."""

    def __init__(self, total: int, description: str, console: Console | None = None) -> None:
        self.done = 0
        self._begin = time.monotonic()
        self._lock = threading.Lock()
        self._bar = Progress(
            TextColumn("{task.description}"), BarColumn(), _Done(), _Speed(), TimeRemainingColumn(),
            console=console or Console(stderr=True), disable=True,
        )  # fmt: skip
        self._task = self._bar.add_task(description, total=total)

    def advance(self, nbytes: int) -> None:
        with self._lock:
            self.done += nbytes
            if self._bar.disable and time.monotonic() - self._begin > _PATIENCE:
                self._bar.disable = False
                self._bar.start()
            if not self._bar.disable:
                self._bar.update(self._task, completed=self.done)

    def close(self) -> None:
        if not self._bar.disable:
            self._bar.stop()


@contextmanager
def metered(total: int, description: str, **options: Any) -> Iterator[Meter]:
    """A Meter that is closed at the end, whatever happens."""
    meter = Meter(total, description, **options)
    try:
        yield meter
    finally:
        meter.close()
