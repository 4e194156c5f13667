# SPDX-License-Identifier: Apache-2.0
"""The CUDA sources, compiled by g++, run right under the emulator of tests/cuda_emulator; and the
same sources with a bug planted in them do not, so what passes here means something."""

import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
CUDA = ROOT / "csrc" / "cuda"
EMULATOR = ROOT / "tests" / "cuda_emulator"
SOURCES = ("device.cu", "table.cu", "experts.cu", "experts_rows.cu", "experts_tiles.cu")
GXX = shutil.which("g++")
FLAGS = (
    *("-std=c++20", "-O1", "-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas"),
    '-DEXPERTYARD_CUDA_ARCHS="80-real"',
)

pytestmark = pytest.mark.skipif(GXX is None, reason="g++ is not installed")

# What is planted: file, the text as it is, the text with the bug, a case that must notice.
ROWS, TILES, CALL = "experts_rows.cuh", "experts_tiles.cuh", "experts.cu"
BUGS = {
    "rows: no barrier before shared memory is read": (
        ROWS, "__syncthreads();  // the stage is whole", "//", "every_format"
    ),
    "rows: no barrier before shared memory is overwritten": (
        ROWS, "if (begin > 0) __syncthreads();", "", "hidden_size_longer"
    ),
    "rows: the token of a pair is wrong": (
        ROWS, "pair / c.top_k * hidden_size", "pair % c.top_k * hidden_size", "every_format"
    ),
    "rows: 16-byte loads from unaligned rows": (
        ROWS, "addresses % 16 == 0 ?", "addresses % 2 == 0 ?", "strides"
    ),
    "rows: the tail of a row is left out": (
        ROWS, "+ lane; i < n;", "+ lane; i < n - 1;", "edge_shapes"
    ),
    "rows: lanes leave before the shuffles": (
        ROWS, "if (!has_row) return;", "if (!has_row || lane == 7) return;", "every_format"
    ),
    "tiles: no barrier before counting": (
        TILES, "__syncthreads();  // counts are zero", "//", "more_experts"
    ),
    "tiles: no barrier before counts are used": (
        TILES, "__syncthreads();  // counts are whole", "//", "more_experts"
    ),
    "tiles: no barrier before places are counted up": (
        TILES, "__syncthreads();  // first_pair is no longer read", "//", "more_experts"
    ),
    "tiles: no barrier between copies and their use": (
        TILES, "__syncthreads();  // this stage is whole", "//", "tiles_of_every_width"
    ),
    "tiles: a copy is not waited for": (
        TILES, "copy_wait<S::kStages - 2>", "copy_wait<S::kStages - 1>", "tiles_of_every_width"
    ),
    "tiles: operands do not match": (
        TILES, "low.x, high.x, low.y, high.y", "low.x, low.y, high.x, high.y", "tiles_of_every"
    ),
    "tiles: x is read past its row": (
        TILES, "row != nullptr && k < n", "row != nullptr", "tiles_of_every_width"
    ),
    "call: runs of tokens overlap": (
        CALL, "first * row_bytes);", "(first > 0) * row_bytes);", "edge_shapes"
    ),
}  # fmt: skip
# So small that every problem goes in several chunks.
SMALL_WORKSPACE = (CALL, "int64_t(128) << 20", "int64_t(1) << 10")


def run(command: list[str], timeout: float) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, capture_output=True, text=True, timeout=timeout, check=False)


def compile_file(source: Path, csrc: Path, output: Path, *flags: str) -> Path:
    includes = [f"-I{csrc}", f"-I{csrc / 'cuda'}", f"-I{EMULATOR}"]
    done = run([str(GXX), *FLAGS, *includes, *flags, str(source), "-o", str(output)], 120)
    assert done.returncode == 0, done.stderr
    return output


def link(objects: list[Path], output: Path) -> Path:
    done = run([str(GXX), *map(str, objects), "-o", str(output)], 60)
    assert done.returncode == 0, done.stderr
    return output


@dataclass(frozen=True)
class Build:
    folder: Path
    objects: dict[str, Path]

    @classmethod
    def make(cls, folder: Path) -> "Build":
        # The emulator is parsed once: half of the time of every compilation.
        (folder / "first.h").write_text('#include "cuda_emulator.h"\n')
        header = folder / "first.h.gch"
        compile_file(folder / "first.h", ROOT / "csrc", header, "-x", "c++-header")
        build = cls(folder, {})
        for source in (*(CUDA / name for name in SOURCES), EMULATOR / "experts_test.cpp"):
            build.objects[source.name] = build.compile(source, ROOT / "csrc", folder)
        return build

    def compile(self, source: Path, csrc: Path, to: Path) -> Path:
        flags = (f"-I{self.folder}", "-include", "first.h", "-x", "c++", "-c")
        return compile_file(source, csrc, to / f"{source.name}.o", *flags)

    def program_with(self, changes: list[tuple[str, str, str]], folder: Path) -> Path:
        """The test program, its changed files compiled from a copy of the sources."""
        csrc = folder / "csrc"
        shutil.copytree(CUDA, csrc / "cuda")
        for header in ("moe.h", "status.h"):
            shutil.copy(ROOT / "csrc" / header, csrc)
        for name, old, new in changes:
            text = (csrc / "cuda" / name).read_text()
            assert text.count(old) == 1, f"{name} has {old!r} {text.count(old)} times"
            (csrc / "cuda" / name).write_text(text.replace(old, new))
        objects = dict(self.objects)
        for name in {f"{Path(name).stem}.cu" for name, _, _ in changes}:
            objects[name] = self.compile(csrc / "cuda" / name, csrc, folder)
        return link(list(objects.values()), folder / "program")


@pytest.fixture(scope="module")
def build(tmp_path_factory: pytest.TempPathFactory) -> Build:
    return Build.make(tmp_path_factory.mktemp("emulated"))


def test_the_emulator_finds_what_it_promises_to(build: Build, tmp_path: Path) -> None:
    test = build.compile(EMULATOR / "simt_test.cpp", ROOT / "csrc", tmp_path)
    program = link([test], tmp_path / "program")
    for seed in range(5):
        done = run([str(program), "--seed", str(seed)], 60)
        assert done.returncode == 0, done.stdout + done.stderr


def test_kernels_and_host_side_are_right(build: Build, tmp_path: Path) -> None:
    program = build.program_with([], tmp_path)
    for seed in ("0", "1"):
        done = run([str(program), "--seed", seed], 120)
        assert done.returncode == 0, done.stdout + done.stderr
        assert " 0 failures" in done.stdout


def test_calls_larger_than_the_workspace_go_in_runs(build: Build, tmp_path: Path) -> None:
    program = build.program_with([SMALL_WORKSPACE], tmp_path)
    done = run([str(program), "edge_shapes", "random_problems", "an_id_out_of_range"], 120)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("bug", BUGS)
def test_a_planted_bug_is_found(bug: str, build: Build, tmp_path: Path) -> None:
    name, old, new, case = BUGS[bug]
    changes = [(name, old, new)] + ([SMALL_WORKSPACE] if name == CALL else [])
    program = build.program_with(changes, tmp_path)
    for seed in ("0", "1"):
        done = run([str(program), "--seed", seed, case], 120)
        assert done.returncode != 0, f"seed {seed} does not notice: {bug}"
