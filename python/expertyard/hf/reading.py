# SPDX-License-Identifier: Apache-2.0
"""What a load reads where transformers cannot: expertyard.from_pretrained() leaves it here, and our
quantizer, which transformers calls with no files, finds it.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path

from ..loading import Checkpoint, LayerSource
from ..loading.packed_folder import PackedFolder
from .kept import NOTHING_KEPT, Kept

__all__ = ["Reading", "current_reading", "reading"]


@dataclass(frozen=True)
class Reading:
    """checkpoint and sources of the experts, or packed: a folder that `expertyard pack` wrote.

    kept    which quantised layers that are no experts stay quantised
    folder  whose headers say how many bytes things take; None if they do not
    """

    checkpoint: Checkpoint | None = None
    sources: tuple[LayerSource, ...] = ()
    packed: PackedFolder | None = None
    folder: Path | None = None
    kept: Kept = NOTHING_KEPT


_current: ContextVar[Reading | None] = ContextVar("expertyard_reading", default=None)


def current_reading() -> Reading | None:
    return _current.get()


@contextmanager
def reading(what: Reading) -> Iterator[None]:
    """Loads that begin inside read `what`."""
    token = _current.set(what)
    try:
        yield
    finally:
        _current.reset(token)
