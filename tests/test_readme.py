# SPDX-License-Identifier: Apache-2.0
"""What the README says is so: its Python runs, its commands exist, its table is the code's."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from expertyard import native
from expertyard.cli import build_parser
from hf_families import FAMILIES

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", README, re.MULTILINE | re.DOTALL)


def row(name: str) -> str:
    (found,) = re.findall(rf"^\| {name} \| (.*?) \|", README, re.MULTILINE)
    return str(found)


def test_the_python_runs() -> None:
    pytest.importorskip("transformers")
    code = "\n".join(blocks("python"))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "bf16_" in done.stdout, "verify's table names the kernels"


def test_the_commands_are_commands() -> None:
    targets = re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    found = [
        shlex.split(line, comments=True) for block in blocks("sh") for line in block.split("\n")
    ]
    found = [words for words in found if words]
    assert {words[0] for words in found} == {"make", "expertyard"}
    for program, *words in found:
        if program == "make":
            assert words[0] in targets
        else:
            build_parser().parse_args(words)


def test_every_kernel_and_format_is_in_the_table() -> None:
    kernels = native._C.kernels()
    rooms = {f"`{kernel['isa']}`" for kernel in kernels}
    formats = {kernel["format"] for kernel in kernels}
    assert set(re.findall(r"`\w+`", row("CPU kernels"))) == rooms
    assert set(re.findall(r"bf16|fp16|fp32|int8|int4|fp8|mxfp4", row("weight formats"))) == formats


def test_every_tested_family_is_in_the_table() -> None:
    assert {name.strip("`") for name in re.findall(r"`\w+`", row("models"))} == set(FAMILIES)


def test_its_links_lead_somewhere() -> None:
    for page in (ROOT / "README.md", ROOT / "CONTRIBUTING.md"):
        for target in re.findall(r"\]\(([^)#]+)", page.read_text(encoding="utf-8")):
            assert target.startswith("https://") or (ROOT / target).exists(), target
