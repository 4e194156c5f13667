# SPDX-License-Identifier: Apache-2.0
"""The installed package is whole: it generates text far from the clone that it was built in."""

from __future__ import annotations

import importlib.metadata
import os
import runpy
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import expertyard

ROOT = Path(__file__).parents[1]
ENV = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}

try:  # find_spec("pip") would make setuptools' import hook step aside for the whole process
    importlib.metadata.distribution("pip")
except importlib.metadata.PackageNotFoundError:
    pytest.skip("pip is not installed", allow_module_level=True)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What `pip install --no-build-isolation .` installs. Without network."""
    folder = tmp_path_factory.mktemp("wheel")
    options = ["--no-build-isolation", "--no-deps", "--no-index", "-q", "-w", str(folder)]
    done = subprocess.run(
        [sys.executable, "-m", "pip", "wheel", *options, str(ROOT)],
        capture_output=True,
        text=True,
        env=ENV,
    )
    assert done.returncode == 0, done.stderr
    (file,) = folder.glob("expertyard-*.whl")
    return file


def test_the_wheel_holds_every_file_of_the_package(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    tracked = subprocess.run(
        ["git", "-C", str(ROOT), "ls-files", "python/expertyard"], capture_output=True, text=True
    ).stdout.split()
    if not tracked:
        pytest.skip("this is no clone")
    missing = {name.removeprefix("python/") for name in tracked} - names
    assert not missing
    assert [name for name in names if name.endswith(".so")] == [
        f"expertyard/{Path(_module()).name}"
    ]
    assert any(name.endswith("entry_points.txt") for name in names)


def test_the_installed_package_generates(wheel: Path, tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    site, elsewhere = tmp_path / "site", tmp_path / "elsewhere"
    zipfile.ZipFile(wheel).extractall(site)
    elsewhere.mkdir()
    done = subprocess.run(
        [sys.executable, "-m", "expertyard", "run", "--max-new-tokens", "4"],
        capture_output=True,
        text=True,
        cwd=elsewhere,
        env={**ENV, "PYTHONPATH": str(site)},
    )
    assert done.returncode == 0, done.stderr
    assert "verified: " in done.stdout
    assert list(elsewhere.iterdir()) == []


@pytest.mark.parametrize(
    ("cards", "asked", "expected"),
    [
        ("8.6\\n8.6", "", "86-real"),
        ("8.0\\n9.0", "", "80-real;90a-real"),
        ("8.7", "", "86-real"),  # not known: the nearest below it
        ("10.3\\n12.1", "", "100-real;120-real"),
        ("7.5", "", None),  # too old for any
        ("[N/A]", "", None),
        ("8.6", "all", None),
        ("8.6", "120-real", "120-real"),
        (None, "", None),
    ],
)
def test_a_build_is_for_the_cards_that_are_here(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cards: str | None, asked: str, expected: object
) -> None:
    smi = tmp_path / "nvidia-smi"
    smi.write_text(f"#!/bin/sh\nprintf '{cards}\\n'\n" if cards else "#!/bin/sh\nexit 9\n")
    smi.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("EXPERTYARD_CUDA_ARCHS", asked)
    monkeypatch.setattr("setuptools.setup", lambda **options: None)
    assert runpy.run_path(str(ROOT / "setup.py"))["cuda_archs"]() == expected


def test_a_build_without_torch_says_what_to_do(tmp_path: Path) -> None:
    """As in an environment of its own: no site-packages with torch is found."""
    code = (
        "import sys, sysconfig\n"
        "sys.path = [p for p in sys.path if 'site-packages' not in p]\n"
        "sysconfig.get_path = lambda name, *a, **k: '/nowhere'\n"
        "source = open('setup.py').read().partition('class CMakeBuild')[0]\n"
        "source = source.replace('from setuptools', '#')\n"
        "space = {'__file__': 'setup.py'}\n"
        "exec(source, space)\n"
        "space['find_torch']()"
    )
    done = subprocess.run(
        [sys.executable, "-I", "-c", code], capture_output=True, text=True, cwd=ROOT, env=ENV
    )
    assert done.returncode == 1
    assert 'pip install "torch>=2.11"' in done.stderr
    assert "--no-build-isolation" in done.stderr


def _module() -> str:
    (file,) = Path(expertyard.__file__).parent.glob("_C*.so")
    return str(file)
