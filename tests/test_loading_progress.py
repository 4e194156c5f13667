# SPDX-License-Identifier: Apache-2.0
"""Progress is drawn for long work only, in GiB, GiB/s and time left, from any thread."""

import io
import threading

from rich.console import Console

from expertyard.loading import progress
from expertyard.loading.progress import metered


def drawn(monkeypatch, seconds_each):
    now = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    out = io.StringIO()
    console = Console(file=out, force_terminal=True, width=120)
    with metered(4 << 30, "Packing experts", console=console) as meter:
        for _ in range(4):
            now[0] += seconds_each
            meter.advance(1 << 30)
    assert meter.done == 4 << 30
    return out.getvalue()


def test_short_work_is_silent(monkeypatch):
    assert drawn(monkeypatch, 0.1) == ""


def test_long_work_shows_gib_and_what_is_left(monkeypatch):
    text = drawn(monkeypatch, 1.5)
    assert "Packing experts" in text and "of 4.00 GiB" in text and "GiB/s" in text


def test_many_threads_count_every_byte():
    with metered(1000, "Packing experts") as meter:
        threads = [
            threading.Thread(target=lambda: [meter.advance(1) for _ in range(100)])
            for _ in range(8)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert meter.done == 800
