# SPDX-License-Identifier: Apache-2.0
"""docs/accuracy.md says what the kernels do now: its figures are measured again and compared."""

from __future__ import annotations

from pathlib import Path

import pytest

from expertyard.bench import accuracy
from expertyard.bench.accuracy import (
    FORMATS,
    HEADINGS,
    Quality,
    error_table,
    errors_of,
    head,
    layer_for,
    modes_of,
    read_tables,
    rooms,
)
from expertyard.bench.shapes import SHAPES

AGAIN = "measure it again: python -m expertyard.bench.accuracy docs/accuracy.md"
FILE = Path(__file__).parents[1] / "docs/accuracy.md"
TEXT = FILE.read_text(encoding="utf-8")
TABLES = read_tables(TEXT)
SAME_ROOMS = rooms() in TEXT
LAYERS = [name for name in SHAPES if name != "small"]
FEW = ("bf16", "int8", "int4", "int4-g32-asym", "fp8-channel", "mxfp4")
QUICK = "Qwen3-30B-A3B"


def test_every_format_mode_and_shape_is_in_the_file() -> None:
    assert set(TABLES) == {"Perplexity", *LAYERS}, AGAIN
    for title, table in TABLES.items():
        assert tuple(table) == FORMATS, f"{title}: {AGAIN}"
        for format, numbers in table.items():
            for heading, number in numbers.items():
                missing = "fast" in heading and "fast" not in modes_of(format)
                assert (number is None) == missing, f"{title}, {format}, {heading}"


@pytest.mark.skipif(not SAME_ROOMS, reason="measured on another instruction set")
def test_what_the_file_says_in_words_is_up_to_date() -> None:
    assert TEXT.startswith(head()), AGAIN


@pytest.mark.parametrize(
    ("shape", "formats"),
    [(QUICK, FEW), *(pytest.param(name, FORMATS, marks=pytest.mark.slow) for name in LAYERS)],
)
def test_errors_are_those_of_the_file(shape: str, formats: tuple[str, ...]) -> None:
    layer = layer_for(SHAPES[shape])
    lines = error_table({format: errors_of(layer, format) for format in formats})
    now = read_tables("\n".join([f"# {shape}", *lines]))[shape]
    for format, numbers in now.items():
        for heading in HEADINGS[1:]:
            written, measured = TABLES[shape][format][heading], numbers[heading]
            said = f"{format}, {heading}: {measured}, the file has {written}; {AGAIN}"
            assert (written is None) == (measured is None), said
            if written is None or measured is None:
                continue
            # two digits are written; other rooms' "exact" rounds less
            assert measured <= 1.15 * written, said
            if SAME_ROOMS or "exact" not in heading:
                assert measured >= 0.85 * written, said


@pytest.fixture(scope="module")
def quality() -> Quality:
    return Quality()


@pytest.mark.parametrize(
    ("format", "mode"),
    [
        ("int4", "fast"),
        ("mxfp4", "exact"),
        *(
            pytest.param(format, mode, marks=pytest.mark.slow)
            for format in FORMATS
            for mode in modes_of(format)
        ),
    ],
)
def test_perplexity_is_that_of_the_file(quality: Quality, format: str, mode: str) -> None:
    written = TABLES["Perplexity"][format][mode]
    assert quality.of(format, mode) == pytest.approx(written, rel=5e-4), AGAIN


def test_the_model_is_its_own_again_after_it_was_measured(
    quality: Quality, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*args: object, **options: object) -> None:
        raise RuntimeError("stop")

    monkeypatch.setattr(accuracy, "perplexity", stop)
    with pytest.raises(RuntimeError, match="stop"):
        quality.of("int8", "fast")
    assert not any("forward" in module.__dict__ for module in quality.model.modules())
