# SPDX-License-Identifier: Apache-2.0
"""The native module keeps its instruction sets apart, hides its symbols, and loses no kernel.

A template instantiated in a file that is compiled for AVX-512 is a weak symbol, and the linker may
give that copy to everybody: an illegal instruction on a machine without AVX-512. So the objects of
a room define none.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from expertyard import native

ROOT = Path(__file__).parents[1]
MODULE = Path(native._C.__file__)
SOURCES = sorted((ROOT / "csrc/cpu").glob("*/*.cpp"))
WEAK = re.compile(r" [WwVvu] ")
# what the compiler may leave to be found elsewhere, and what a weak reference without a body is
HARMLESS = re.compile(r"^ +[wv] ")

needs_nm = pytest.mark.skipif(shutil.which("nm") is None, reason="nm is not installed")


def lines(*command: str | Path) -> list[str]:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()


@pytest.fixture(scope="module")
def build_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the last build, or, without one, of a build of the rooms alone."""
    folders = [cache.parent for cache in (ROOT / "build").glob("*/CMakeCache.txt")]
    if chosen := os.environ.get("EXPERTYARD_BUILD_DIR"):
        folders = [Path(chosen)]
    built = [folder for folder in folders if all(objects(folder, source) for source in SOURCES)]
    if built:
        return max(built, key=lambda folder: folder.stat().st_mtime)
    cmake = shutil.which("cmake")
    if cmake is None or shutil.which("c++") is None:
        pytest.skip("no objects of a build are here, and no CMake or compiler to make them")
    folder = tmp_path_factory.mktemp("build")
    options = ["-DEXPERTYARD_PYTHON=OFF", "-DEXPERTYARD_CUDA=OFF"]
    lines(cmake, "-S", ROOT, "-B", folder, *options)
    targets = {f"expertyard_{source.parent.name}" for source in SOURCES}
    jobs = str(len(os.sched_getaffinity(0)))
    lines(cmake, "--build", folder, "--parallel", jobs, "--target", *sorted(targets))
    return folder


def objects(build: Path, source: Path) -> list[Path]:
    """The object files of a source."""
    isa = source.parent.name
    return list(build.glob(f"CMakeFiles/expertyard_{isa}.dir/csrc/cpu/{isa}/{source.name}.o"))


@needs_nm
@pytest.mark.parametrize("source", SOURCES, ids=lambda s: f"{s.parent.name}/{s.name}")
def test_a_room_leaks_no_weak_symbols(build_folder: Path, source: Path) -> None:
    (file,) = objects(build_folder, source)
    symbols = lines("nm", "-C", file)
    assert any(" r " in line or " d " in line for line in symbols), "no kernel in this object?"
    leaks = [line for line in symbols if WEAK.search(line) and not HARMLESS.match(line)]
    assert not leaks, f"put these into an anonymous namespace: {leaks}"


@needs_nm
def test_the_module_exports_only_its_entry() -> None:
    exported = [line.split()[-1] for line in lines("nm", "-D", "--defined-only", MODULE)]
    assert exported == ["PyInit__C"]


@pytest.mark.skipif(shutil.which("readelf") is None, reason="readelf is not installed")
def test_the_module_names_no_folder_of_the_machine_that_built_it() -> None:
    dynamic = lines("readelf", "-d", MODULE)
    assert any("NEEDED" in line for line in dynamic)
    assert not [line for line in dynamic if "RPATH" in line or "RUNPATH" in line]


def test_every_kernel_of_the_source_is_in_the_registry() -> None:
    here = {f"{source.stem}_{source.parent.name}" for source in SOURCES}
    registered = [kernel["name"] for kernel in native._C.kernels()]
    assert len(registered) == len(set(registered))
    if os.uname().machine != "x86_64":
        here = {name for name in here if name.endswith("_scalar")}
    assert set(registered) == here
