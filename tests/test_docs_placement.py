# SPDX-License-Identifier: Apache-2.0
"""Every command in docs/placement.md prints what the page shows."""

import re
import shlex
from pathlib import Path

import pytest

from expertyard.cli.plan import main
from expertyard.spec.known import known_models

PAGE = (Path(__file__).parent.parent / "docs" / "placement.md").read_text(encoding="utf-8")
FILES = dict(re.findall(r"`([\w.]+)`:\n```\w+\n(.*?)```", PAGE, re.S))
COMMANDS = re.findall(r"```console\n\$ expertyard plan (.*?)\n(.*?)```", PAGE, re.S)


def lines(text: str) -> list[str]:
    return [line.rstrip() for line in text.rstrip().split("\n")]


@pytest.mark.parametrize(("command", "shown"), COMMANDS, ids=[c for c, _ in COMMANDS])
def test_the_output_is_real(
    command: str,
    shown: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    for name, text in FILES.items():
        (tmp_path / name).write_text(text, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("FORCE_COLOR", raising=False)
    refused = re.match(r"\w+Error: ", shown) is not None
    assert main(shlex.split(command)) == (2 if refused else "--strict" in command)
    out, err = capsys.readouterr()
    assert (out if refused else err) == ""
    assert lines(err if refused else out) == lines(shown)


def test_every_grammar_and_finding_is_on_the_page() -> None:
    from expertyard.rules import GRAMMARS

    assert len(COMMANDS) >= 8 and len(FILES) == 4
    assert all(name in PAGE for name in known_models())
    for field in set(GRAMMARS) - {"override_tensor"}:
        assert f"--{field.replace('_', '-')}" in PAGE
    source = Path(__file__).parent.parent / "python" / "expertyard"
    code = "".join(path.read_text() for path in source.glob("[rp][ul]*/**/*.py"))
    for name in set(re.findall(r'"(?:error|warning|note)",\s*"([a-z-]+)"', code)):
        assert name in PAGE, name
