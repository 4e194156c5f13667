# SPDX-License-Identifier: Apache-2.0
"""A bar appears when work takes more than two seconds, and not before."""

from expertyard.loading import progress


def track(monkeypatch, seconds_per_item):
    clock = iter(range(1000))
    monkeypatch.setattr(progress.time, "monotonic", lambda: next(clock) * seconds_per_item)
    return list(progress.tracked(range(10), "Packing experts"))


def test_quick_work_is_silent(monkeypatch, capsys):
    assert track(monkeypatch, 0.01) == list(range(10))
    assert capsys.readouterr() == ("", "")


def test_long_work_shows_a_bar_on_stderr(monkeypatch, capsys):
    assert track(monkeypatch, 1.0) == list(range(10))
    out, err = capsys.readouterr()
    assert out == ""
    assert "Packing experts" in err and "10/10" in err
