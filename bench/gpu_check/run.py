# SPDX-License-Identifier: Apache-2.0
"""Runs parts until they are done or the time is up."""

import sys
import time
from collections.abc import Callable, Sequence
from typing import Any, Protocol

from .parts import PARTS
from .state import State


class OutOfTime(Exception):
    """A part gives up here and goes on in the next run."""


class Clock:
    """Time left of a run."""

    def __init__(self, seconds: float, now: Callable[[], float] = time.monotonic) -> None:
        self._now = now
        self._end = now() + seconds

    def left(self) -> float:
        return self._end - self._now()

    def need(self, seconds: float) -> None:
        """Raises OutOfTime if that much is not left."""
        if self.left() < seconds:
            raise OutOfTime


class Context(Protocol):
    """What a part gets besides its results."""

    clock: Clock


def run_parts(
    state: State, card: Any, names: Sequence[str], again: Sequence[str], seconds: float
) -> int:
    """0: all of names are done; 1: some failed; 4: out of time, call again."""
    clock = Clock(seconds)
    for name in again:
        state.forget(name)
    wanted = [p for p in PARTS if p.name in names or p.name in again]
    for part in wanted:
        if state.status(part.name) == "done":
            print(f"{part.name}: done before", flush=True)
            continue
        begin = time.monotonic()
        status, error = "done", None
        try:
            clock.need(part.least_seconds)
            print(f"{part.name}: {part.what}", flush=True)
            part.run(card, state.results(part.name), clock, state.save)
        except OutOfTime:
            status = "stopped"
        except KeyboardInterrupt:
            state.finish(part.name, "stopped", time.monotonic() - begin)
            raise
        except Exception as e:  # one part's failure must not cost the others
            status, error = "failed", f"{type(e).__name__}: {e}"
            print(f"{part.name}: FAILED: {error}", file=sys.stderr, flush=True)
        state.finish(part.name, status, time.monotonic() - begin, error)
    failed = [p.name for p in wanted if state.status(p.name) == "failed"]
    left = [p.name for p in wanted if state.status(p.name) == "stopped"]
    print(f"results: {state.path}")
    if failed:
        print(f"failed: {', '.join(failed)}", file=sys.stderr)
        return 1
    if left:
        print(f"out of time; call again for: {', '.join(left)}")
        return 4
    print("all parts are done")
    return 0
