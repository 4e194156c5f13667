# SPDX-License-Identifier: Apache-2.0
"""The Python in docs/huggingface.md runs as it is printed, and its table of families is true."""

import re
from pathlib import Path

import pytest

pytest.importorskip("transformers")

import test_hf_outside as outside
from hf_families import FAMILIES, save, tiny_model

PAGE = (Path(__file__).parent.parent / "docs" / "huggingface.md").read_text(encoding="utf-8")


def test_the_examples_run_in_order(tmp_path, capsys):
    path = save(tiny_model("qwen3_moe"), tmp_path)
    names = {"path": path}
    blocks = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    assert len(blocks) >= 4
    for block in blocks:
        exec(compile(block, "docs/huggingface.md", "exec"), names)
    assert "model.layers.1.mlp.experts" in capsys.readouterr().out


def test_the_families_tested_on_all_roads_are_those_in_the_table():
    (row,) = re.findall(r"^\| whole models on all three roads.*\| (.*) \|$", PAGE, re.MULTILINE)
    assert row.split(", ") == list(FAMILIES)


def test_the_roads_of_families_with_ways_of_their_own_are_those_in_the_table():
    (row,) = re.findall(
        r"^\| whole models on every road that they.*\| (.*) \|$", PAGE, re.MULTILINE
    )
    letters = {"load": "A", "implementation": "B", "attach": "C"}
    assert dict(re.findall(r"(\w+) \((.*?)\)", row)) == {
        family: ", ".join(letters[road] for road in roads)
        for family, (roads, _) in outside.FAMILIES.items()
    }
