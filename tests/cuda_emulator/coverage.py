# SPDX-License-Identifier: Apache-2.0
"""Which lines of the kernels (csrc/cuda/*.cuh) the emulated tests run: all, or this fails and names
them. Needs g++ and gcov.

    python tests/cuda_emulator/coverage.py           (a few minutes)

ptx.cuh and the device half of wgmma.cuh are instructions that only a GPU has; g++ never sees them.
A line counts once, whichever template instance or source file ran it.
"""

import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
CSRC = ROOT / "csrc"
CUDA = CSRC / "cuda"
EMULATOR = Path(__file__).resolve().parent
TESTS = (
    "experts_test.cpp", "stream_test.cpp", "grouped_test.cpp", "wgmma_test.cpp",
    "wgmma_fast_test.cpp", "choice_test.cpp", "simt_test.cpp",
)  # fmt: skip
# the hand-off has the host's side beside its kernels, and none of the others
HANDOFF = "handoff_test.cpp"
BESIDE = (
    "cuda/device.cu",
    "cuda/handoff.cu",
    "handoff/lane.cpp",
    "handoff/signal.cpp",
    "cpu/threads.cpp",
)
FLAGS = (
    "-std=c++20", "-O0", "--coverage", "-Wno-unknown-pragmas", "-x", "c++", "-c",
    '-DEXPERTYARD_CUDA_ARCHS="80-real"', "-DEXPERTYARD_HOPPER=1",
    f"-I{CSRC}", f"-I{CUDA}", f"-I{EMULATOR}",
)  # fmt: skip


def run(*command: str | Path, cwd: Path) -> str:
    done = subprocess.run([*map(str, command)], cwd=cwd, capture_output=True, text=True)
    if done.returncode != 0:
        sys.exit(f"{command[0]} failed:\n{done.stdout[-2000:]}{done.stderr[-2000:]}")
    return done.stdout


def run_tests(folder: Path) -> None:
    """Compiles everything with counters, and runs it: they lie beside the objects."""
    kernels = [*sorted(CUDA.glob("*.cu"))]

    def compile_file(source: Path) -> None:
        run("g++", *FLAGS, source, "-o", f"{source.name}.o", cwd=folder)

    host = [CSRC / name for name in BESIDE if not name.startswith("cuda/")]
    tests = [EMULATOR / test for test in (*TESTS, HANDOFF)]
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(compile_file, [*kernels, *host, *tests]))
    objects = [f"{source.name}.o" for source in kernels]
    beside = [f"{Path(name).name}.o" for name in BESIDE]
    for test in (*TESTS, HANDOFF):
        others = beside if test == HANDOFF else objects
        run("g++", "--coverage", "-pthread", f"{test}.o", *others, "-o", "program", cwd=folder)
        run(folder / "program", cwd=folder)


def counts(folder: Path) -> dict[Path, dict[int, int]]:
    """How often each line of the kernels' files ran, by file."""
    lines: dict[Path, dict[int, int]] = {}
    for data in sorted(folder.glob("*.gcda")):
        text = run("gcov", "--json-format", "--stdout", data, cwd=folder)
        for document in text.splitlines():
            for file in json.loads(document)["files"]:
                path = Path(file["file"]).resolve()
                if path.suffix != ".cuh" or CUDA not in path.parents:
                    continue
                of_file = lines.setdefault(path, {})
                for line in file["lines"]:
                    number = line["line_number"]
                    of_file[number] = of_file.get(number, 0) + line["count"]
    return lines


def missed(lines: dict[Path, dict[int, int]]) -> Iterator[str]:
    for path, of_file in sorted(lines.items()):
        text = path.read_text().splitlines()
        for number, count in sorted(of_file.items()):
            if count == 0:
                yield f"{path.relative_to(ROOT)}:{number}: {text[number - 1].strip()}"


def main() -> int:
    with tempfile.TemporaryDirectory() as folder:
        run_tests(Path(folder))
        lines = counts(Path(folder))
    never = [*missed(lines)]
    total = sum(len(of_file) for of_file in lines.values())
    share = 100 * (total - len(never)) / max(total, 1)
    print("\n".join(never))
    print(f"{total - len(never)} of {total} lines of {len(lines)} files ran: {share:.1f} %")
    return 0 if lines and not never else 1


if __name__ == "__main__":
    sys.exit(main())
