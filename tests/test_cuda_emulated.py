# SPDX-License-Identifier: Apache-2.0
"""The CUDA sources, compiled by g++, run right under the emulator of tests/cuda_emulator; and the
same sources with a bug planted in them do not, so what passes here means something."""

import shutil
import subprocess
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
BUGS = {
    "no barrier before shared memory is read": (
        "experts_rows.cuh",
        "__syncthreads();  // the stage is whole",
        "",
        "every_format",
    ),
    "no barrier before shared memory is overwritten": (
        "experts_rows.cuh",
        "if (begin > 0) __syncthreads();",
        "",
        "hidden_size_longer",
    ),
    "the token of a pair is wrong": (
        "experts_rows.cuh",
        "pair / c.top_k * hidden_size",
        "pair % c.top_k * hidden_size",
        "every_format",
    ),
    "16-byte loads from unaligned rows": (
        "experts_rows.cuh",
        "addresses % 16 == 0 ?",
        "addresses % 2 == 0 ?",
        "strides",
    ),
    "the tail of a row is left out": (
        "experts_rows.cuh",
        "i = vectors * W::kPerVector + lane; i < n;",
        "i = vectors * W::kPerVector + lane; i < n - 1;",
        "edge_shapes",
    ),
    "lanes leave before the shuffles": (
        "experts_rows.cuh",
        "if (!has_row) return;",
        "if (!has_row || lane == 7) return;",
        "every_format",
    ),
    "an id out of range is ignored": (
        "experts_rows.cuh",
        "*id > c.set.num_experts) return Chosen::kBadId",
        "*id > c.set.num_experts) return Chosen::kNone",
        "an_id_out_of_range",
    ),
    "chunks of tokens overlap": (
        "experts.cu",
        "first * row_bytes);",
        "(first > 0) * row_bytes);",
        "edge_shapes",
    ),
}
# So small that every problem goes in several chunks.
SMALL_WORKSPACE = ("experts.cu", "int64_t(128) << 20", "int64_t(1) << 10")


def run(command: list[str], timeout: float) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, capture_output=True, text=True, timeout=timeout, check=False)


def compile_object(source: Path, csrc: Path, output: Path) -> Path:
    includes = [f"-I{csrc}", f"-I{csrc / 'cuda'}", f"-I{EMULATOR}"]
    done = run(
        [str(GXX), *FLAGS, *includes, "-x", "c++", "-c", str(source), "-o", str(output)], 120
    )
    assert done.returncode == 0, done.stderr
    return output


def link(objects: list[Path], output: Path) -> Path:
    done = run([str(GXX), *map(str, objects), "-o", str(output)], 60)
    assert done.returncode == 0, done.stderr
    return output


@pytest.fixture(scope="module")
def objects(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("emulated")
    sources = {name: CUDA / name for name in SOURCES}
    sources["test"] = EMULATOR / "experts_test.cpp"
    return {k: compile_object(p, ROOT / "csrc", folder / f"{k}.o") for k, p in sources.items()}


def with_changes(
    changes: list[tuple[str, str, str]], objects: dict[str, Path], folder: Path
) -> Path:
    """The test program; its experts.cu comes from a copy of the sources that has the changes."""
    csrc = folder / "csrc"
    shutil.copytree(ROOT / "csrc" / "cuda", csrc / "cuda")
    for header in ("moe.h", "status.h"):
        shutil.copy(ROOT / "csrc" / header, csrc)
    for name, old, new in changes:
        text = (csrc / "cuda" / name).read_text()
        assert text.count(old) == 1, f"{name} has {old!r} {text.count(old)} times"
        (csrc / "cuda" / name).write_text(text.replace(old, new))
    changed = compile_object(csrc / "cuda" / "experts.cu", csrc, folder / "experts.o")
    return link([*(o for k, o in objects.items() if k != "experts.cu"), changed], folder / "run")


def test_kernels_and_host_side_are_right(objects: dict[str, Path], tmp_path: Path) -> None:
    program = link(list(objects.values()), tmp_path / "run")
    for seed in ("0", "1"):
        done = run([str(program), "--seed", seed], 120)
        assert done.returncode == 0, done.stdout + done.stderr
    assert "0 failures" in done.stdout


def test_calls_larger_than_the_workspace_go_in_chunks(
    objects: dict[str, Path], tmp_path: Path
) -> None:
    program = with_changes([SMALL_WORKSPACE], objects, tmp_path)
    done = run([str(program), "edge_shapes", "random_problems", "an_id_out_of_range"], 120)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("bug", BUGS)
def test_a_planted_bug_is_found(bug: str, objects: dict[str, Path], tmp_path: Path) -> None:
    name, old, new, case = BUGS[bug]
    changes = [(name, old, new)]
    if bug.startswith("chunks"):
        changes.append(SMALL_WORKSPACE)
    program = with_changes(changes, objects, tmp_path)
    for seed in ("0", "1", "2"):
        done = run([str(program), "--seed", seed, case], 120)
        assert done.returncode != 0, f"seed {seed} does not notice: {bug}"
