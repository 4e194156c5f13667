# SPDX-License-Identifier: Apache-2.0
"""`expertyard doctor` says what this machine can run, and why not more."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch

from expertyard import native
from expertyard.cli import doctor, main


def facts(capsys: pytest.CaptureFixture[str], code: int = 0) -> dict[str, Any]:
    assert main(["doctor", "--json"]) == code
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


def test_every_kernel_is_listed_with_a_reason_if_it_cannot_run(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    table = [dict(kernel) for kernel in native._C.kernels()]
    table[-1] |= {"runnable": False, "missing": ["avx512_bf16"], "needs": ["avx512_bf16"]}

    class Patched:
        kernels = staticmethod(lambda: table)

        def __getattr__(self, name: str) -> Any:
            return getattr(native_module, name)

    native_module = native._C
    monkeypatch.setattr(native, "_C", Patched())
    assert main(["doctor"]) == 0
    out = capsys.readouterr().out
    for kernel in table:
        assert kernel["name"] in out
    assert "this CPU has no avx512_bf16" in out


def test_the_json_has_what_the_machine_has(capsys: pytest.CaptureFixture[str]) -> None:
    found = facts(capsys)
    assert found["problems"] == []
    assert found["packages"]["torch"]["version"] == torch.__version__
    assert 1 <= found["threads"]["used"] <= found["threads"]["usable"]
    assert found["memory"]["cpu"] > 0
    assert found["chosen"]["bf16"] in {kernel["name"] for kernel in found["kernels"]}
    assert found["cuda"]["usable"] or found["cuda"]["why"]


def test_the_cuda_sentence_is_shown_whole(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor"]) == 0
    shown = "".join(capsys.readouterr().out.split())
    cuda = native._C.cuda_status()
    if not cuda["usable"]:  # brackets in it are no markup
        assert "".join(cuda["why"].split()) in shown


def test_a_forced_instruction_set_is_shown(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("EXPERTYARD_ISA", "scalar")
    found = facts(capsys)
    assert found["forced_isa"] == "scalar"
    assert set(found["chosen"].values()) == {"bf16_scalar", "fp16_scalar", "fp32_scalar"}


def test_virtual_gpus_are_shown(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("EXPERTYARD_VIRTUAL_GPUS", "2")
    found = facts(capsys)
    assert found["virtual_gpus"] == 2
    assert [*found["memory"]] == ["cuda:0", "cuda:1", "cpu"]
    assert main(["doctor"]) == 0
    assert "EXPERTYARD_VIRTUAL_GPUS" in capsys.readouterr().out


def test_an_instruction_set_that_does_not_exist_is_a_problem(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("EXPERTYARD_ISA", "avx1024")
    (problem,) = facts(capsys, code=1)["problems"]
    assert "avx1024" in problem
    assert "scalar" in problem


@pytest.mark.parametrize(
    ("found", "problem", "note"),
    [
        ("2.10.1", "torch 2.10.1 is too old: expected 2.11 or newer.", "too old"),
        ("2.13.0+cpu", "", ""),
        ("3.1", "", "newer than 2.15"),
    ],
)
def test_versions_are_judged(
    monkeypatch: pytest.MonkeyPatch, found: str, problem: str, note: str
) -> None:
    monkeypatch.setattr("importlib.metadata.version", lambda name: found)
    about = doctor.package("torch")
    assert about["problem"] == problem
    assert note in about["note"]
    assert bool(about["note"]) == bool(note)
