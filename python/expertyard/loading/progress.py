# SPDX-License-Identifier: Apache-2.0
"""A progress bar for work that may take long: nothing is drawn in the first two seconds."""

import time
from collections.abc import Iterator, Sequence
from typing import TypeVar

from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
)

__all__ = ["tracked"]

_PATIENCE = 2.0  # seconds

T = TypeVar("T")


def tracked(items: Sequence[T], description: str) -> Iterator[T]:
    """Yields the items; shows a bar on stderr once two seconds have passed and work remains."""
    from rich.console import Console

    begin = time.monotonic()
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True), auto_refresh=True, disable=True) as bar:
        task = bar.add_task(description, total=len(items))
        for done, item in enumerate(items):
            if bar.disable and time.monotonic() - begin > _PATIENCE:
                bar.disable = False
                bar.start()
            bar.update(task, completed=done)
            yield item
        bar.update(task, completed=len(items))
