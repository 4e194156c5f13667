# SPDX-License-Identifier: Apache-2.0
"""The CUDA sources, compiled by g++, run right under the emulator of tests/cuda_emulator; and the
same sources with a bug planted in them do not, so what passes here means something."""

import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import pytest

from nightly import soon

ROOT = Path(__file__).resolve().parents[1]
CUDA = ROOT / "csrc" / "cuda"
EMULATOR = ROOT / "tests" / "cuda_emulator"
SOURCES = tuple(path.name for path in sorted(CUDA.glob("*.cu")))
# the kernels of weights as they lie; those of packed weights; which of them a call gets
TESTS = (
    "experts_test.cpp", "stream_test.cpp", "grouped_test.cpp", "wgmma_test.cpp",
    "wgmma_fast_test.cpp", "choice_test.cpp",
)  # fmt: skip
# how the names of their cases begin, where that is not the names of tests of experts_test.cpp
OF_PACKED = {
    "stream": "stream_test.cpp", "grouped": "grouped_test.cpp", "wgmma": "wgmma_test.cpp",
    "fast": "wgmma_fast_test.cpp",
}  # fmt: skip
GXX = shutil.which("g++")
FLAGS = (
    *("-std=c++20", "-O1", "-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas"),
    *('-DEXPERTYARD_CUDA_ARCHS="80-real"', "-DEXPERTYARD_HOPPER=1"),
)

pytestmark = pytest.mark.skipif(GXX is None, reason="g++ is not installed")

# What is planted: file, the text as it is, the text with the bug, a case that must notice. A bug in
# what all packed formats share is compiled into int4's kernels alone.
ROWS, TILES, CALL = "experts_rows.cuh", "experts_tiles.cuh", "experts.cu"
STREAM, GROUPED, CHUNK, ROUTING = "stream.cuh", "grouped.cuh", "chunk.cuh", "routing.cuh"
ENDS, EPILOGUE, HOPPER = "grouped_ends.cuh", "grouped_epilogue.cuh", "hopper.cuh"
RING, PRODUCER, FAST = "hopper_ring.cuh", "hopper_producer.cuh", "hopper_fast.cuh"
PARTS = "parts.cuh"
COMPILED_IN = {
    ROWS: "experts_rows.cu",
    TILES: "experts_tiles.cu",
    STREAM: "packed_int4.cu",
    GROUPED: "packed_int4.cu",
    EPILOGUE: "packed_int4.cu",
    PARTS: "packed_int4.cu",
    CHUNK: "packed_int4.cu",
    "scale.cuh": "packed_int4.cu",
    "format.cuh": "packed_int4.cu",
    **dict.fromkeys((HOPPER, RING, PRODUCER, "wgmma.cuh"), "hopper_int4.cu"),
    FAST: "hopper_fp8_fast.cu",
    ROUTING: "grouped_run.cu",
    ENDS: "grouped_run.cu",
    **{f"formats/{f}.cuh": f"packed_{f}.cu" for f in ("bf16", "int8", "fp8", "int4", "mxfp4")},
}
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
    "routing: no barrier before counting": (
        ROUTING, "__syncthreads();  // counts are zero", "//", "grouped_tiles_of_every_width"
    ),
    "routing: no barrier before counts are used": (
        ROUTING, "__syncthreads();  // counts are whole", "//", "grouped_tiles_of_every_width"
    ),
    "routing: no barrier before places are counted up": (
        ROUTING, "__syncthreads();  // first_pair is no longer read", "//", "grouped_many_experts"
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
    "stream: no barrier before the sort": (
        STREAM, "__syncthreads();  // choices are known", "//", "stream_many_experts"
    ),
    "stream: no barrier before places are used": (
        STREAM, "__syncthreads();  // every expert has its place", "//", "stream_many_experts"
    ),
    "stream: no barrier before the ring is used": (
        STREAM, "__syncthreads();  // tiles are whole", "//", "stream_many_experts"
    ),
    "stream: the sort counts before all have read": (
        STREAM, "__syncwarp();  // counts are read", "//", "stream_many_tokens"
    ),
    "stream: shares are summed before they are there": (
        STREAM, "__syncthreads();  // all shares are there", "//", "stream_random"
    ),
    "stream: one buffer for the shares of two items": (
        STREAM, "turn % 2 * (kWarps", "turn % 1 * (kWarps", "stream_random"
    ),
    "stream: lanes run ahead of each other": (
        STREAM, "__syncwarp();  // the chunk is here", "//", "stream_random"
    ),
    "stream: a copy is not waited for": (
        STREAM, "copy_wait_for(a.stages - 2)", "copy_wait_for(a.stages - 1)", "stream_random"
    ),
    "stream: h is not awaited by what was copied ahead": (
        STREAM, "      await_tile(index);", "", "stream_random"
    ),
    "stream: h is not awaited by what is copied later": (
        STREAM, "await_tile(index / m.num_blocks);", "", "stream_many_experts"
    ),
    "stream: late copies of h are not waited for": (
        STREAM, "ptx::copy_wait_for(0);  // once", "//", "stream_on_cards"
    ),
    "stream: h is whole one pair early": (
        STREAM, "(count + 1) / 2 : count", "count / 2 : count", "stream_many_tokens"
    ),
    "stream: y is not awaited": (STREAM, "!= all_pairs) {", "> all_pairs) {", "stream_random"),
    "stream: a warp reports before its lanes have written": (
        STREAM, "__syncwarp();  // written by all lanes\n      if (lane == 0) ptx::add_release("
        "&a.counters->done", "if (lane == 0) ptx::add_release(&a.counters->done", "stream_random"
    ),
    "stream: the next launch finds counters that are not zero": (
        STREAM, "a.counters->ready[1 - parity][i] = 0;", "", "stream_launches"
    ),
    "stream: the parity does not change": (
        STREAM, "kLaunch - (gridDim.x - 1) : 1", "1 : 1", "stream_launches"
    ),
    "stream: h of the wrong pair": (
        STREAM, "const int64_t row = kH ? pair : pair", "const int64_t row = kH ? 0 : pair",
        "stream_random"
    ),
    "stream: a stage too small": (
        "stream.cu", "c.heads_bytes + format.chunk_bytes + c.columns",
        "c.heads_bytes + format.chunk_bytes + (c.columns - 1)", "stream_every_kind"
    ),
    "chunk: heads of lines that are not there": (
        CHUNK, "valid ? line_begin + i * m.line_bytes + lane * 16 : block, valid)",
        "line_begin + i * m.line_bytes + lane * 16, valid || true)", "stream_every_kind"
    ),
    "chunk: weights read past the matrix": (
        CHUNK, "valid ? from + q * 512 + heads : block, valid)",
        "from + q * 512 + heads, valid || true)", "stream_every_kind"
    ),
    "chunk: rows in another order": (
        CHUNK, "F::pair(dwords[2 * j + 1], s, 0)", "F::pair(dwords[2 * (1 - j) + 1], s, 0)",
        "stream_random"
    ),
    "chunk: the scale of another row": (
        CHUNK, "scales[2 * j + i / 2] * products", "scales[2 * j + i % 2] * products",
        "stream_every_kind"
    ),
    "chunk: the scales of another group": (
        CHUNK, "stage + (q >> m.quad_shift) * m.head_bytes;", "stage;", "stream_every_kind"
    ),
    "chunk: a group's products are not cleared": (
        CHUNK, "products[j][n][i] = 0.0f;", "", "stream_every_kind"
    ),
    "chunk: zeros are left out": (
        CHUNK, "(zeros[2 * j + i / 2] - kInt4Middle)", "0.0f", "stream_every_kind"
    ),
    "grouped: no barrier before the pairs are used": (
        GROUPED, "__syncthreads();  // the pairs are known", "//", "grouped_random"
    ),
    "grouped: no barrier between copies and their use": (
        GROUPED, "__syncthreads();  // this stage is whole", "//", "grouped_random"
    ),
    "grouped: a copy is not waited for": (
        GROUPED, "copy_wait_for(a.stages - 2)", "copy_wait_for(a.stages - 1)", "grouped_random"
    ),
    "grouped: gate and up change places": (
        EPILOGUE, "const bool is_gate = lane < 16;", "const bool is_gate = lane >= 16;",
        "grouped_random"
    ),
    "grouped: h in another order than the products": (
        EPILOGUE, "{place(a.order, row),", "{row,", "grouped_random"
    ),
    "grouped: the columns behind the first part get its sums": (
        PARTS, "move(sums[j][n], sums[j][n - kPart]);", "continue;", "grouped_tiles_of_every_width"
    ),
    "fast: the columns of the first part are lost": (
        PARTS, "move(done[n], sums[j][kBlocks - kPart + n]);", "continue;", "fast_every_packing"
    ),
    "grouped: x in another order than the products": (
        ENDS, "place(order, k)", "place(order == 4 ? 8 : 4, k)", "grouped_random"
    ),
    "grouped: no barrier before the slots are used": (
        ENDS, "__syncthreads();  // slots are known", "//", "grouped_random"
    ),
    "wgmma: no barrier before the barriers are used": (
        HOPPER, "__syncthreads();  // the barriers are there", "//", "wgmma_random"
    ),
    "wgmma: a stage is used before it is whole": (
        HOPPER, "ptx::barrier_wait(read_.ring.full(read_.ring.stage), read_.ring.parity);", "",
        "wgmma_rows_longer"
    ),
    "wgmma: a stage is filled before it is free": (
        PRODUCER, "if (!ptx::barrier_test(ring_.empty(ring_.stage), ring_.parity ^ 1)) {",
        "if (false) {", "wgmma_rows_longer"
    ),
    "wgmma: a stage is given back before the products are done": (
        HOPPER, "load_two_scales(head, group, j, scales);\n        ptx::wgmma_wait<0>();",
        "load_two_scales(head, group, j, scales);", "wgmma_rows_longer"
    ),
    "wgmma: the weights of a product are not in order before it": (
        HOPPER, "F::pair(high, slice, 1)};\n          ptx::wgmma_fence();",
        "F::pair(high, slice, 1)};", "wgmma_random"
    ),
    "wgmma: tokens are told of without a fence": (
        PRODUCER, "ptx::fence_for_async();", "", "wgmma_random"
    ),
    "wgmma: a copy of tokens is not waited for": (
        PRODUCER, "ptx::copy_wait<kOpenCopies>();", "ptx::copy_wait<kOpenCopies + 1>();",
        "wgmma_rows_longer"
    ),
    "wgmma: fewer bytes are expected than come": (
        PRODUCER, "arrive_expecting(full, bytes)", "arrive_expecting(full, bytes - 16)",
        "wgmma_random"
    ),
    "wgmma: the parity does not change": (RING, "parity ^= 1;", "", "wgmma_rows_longer"),
    "wgmma: tokens are not swizzled": (
        "wgmma.cuh", "(piece ^ row % kPanelRows)", "piece", "wgmma_random"
    ),
    "wgmma: the tokens of another slice": (
        RING, "slice % 4 * 32", "slice % 2 * 32", "wgmma_random"
    ),
    "wgmma: rows change places": (
        RING, "rows[i] = high ? w[i ^ 2] : w[i];", "rows[i] = high ? w[i] : w[i];", "wgmma_random"
    ),
    "wgmma: the scales of the other half of the rows": (
        HOPPER, "read_.lane / 4 * 4 + 2 * j;", "read_.lane / 4 * 4 + 0 * j;", "wgmma_random"
    ),
    "wgmma: the scales of another group": (
        HOPPER, "chunk + line * m.head_bytes + (line << m.quad_shift) * 512;", "chunk;",
        "wgmma_every_kind"
    ),
    "wgmma: the end of a last chunk is not cleared": (
        PRODUCER, "        clear_end(chunk);\n", "", "wgmma_every_kind"
    ),
    "wgmma: the end of a row of h is not written": (
        HOPPER, "clear(sums);  // the end of a row of h", "continue;  //", "wgmma_every_kind"
    ),
    "wgmma: a tile's pairs are those of another": (
        PRODUCER, "a.routing.sorted[tile.first + column] /", "a.routing.sorted[column] /",
        "wgmma_random"
    ),
    "wgmma, zeros: left out": (
        HOPPER, "if constexpr (Tokens<F>::kFloats > 0) subtract_zeros(sums);", "",
        "wgmma_every_kind"
    ),
    "wgmma, zeros: of the other half of the rows": (
        HOPPER, "zeros[2 + i / 2] * sum", "zeros[i / 2] * sum", "wgmma_every_kind"
    ),
    "wgmma, zeros: the sums of another group": (
        HOPPER, "* 16 + group * 4", "* 16", "wgmma_every_kind"
    ),
    "wgmma, zeros: the zeros of another group": (
        HOPPER, "line = group >> m.quad_shift", "line = 0 * group", "wgmma_every_kind"
    ),
    "wgmma, zeros: sums of half a group": (
        ENDS, "k + group_k < stride ? k + group_k", "k + 32 < stride ? k + 32", "wgmma_every_kind"
    ),
    "fast: no barrier before the barriers are used": (
        FAST, "__syncthreads();  // the barriers are there", "//", "fast_random"
    ),
    "fast: a stage is used before it is whole": (
        FAST, "ptx::barrier_wait(read_.ring.full(read_.ring.stage), read_.ring.parity);", "",
        "fast_rows_and_items"
    ),
    "fast: sums are used before they are there": (
        FAST, "ptx::wgmma_wait<0>();", "ptx::wgmma_wait<1>();", "fast_every_packing"
    ),
    "fast: no fence before the products": (
        FAST, "if (j == 0 || s == 0) ptx::wgmma_fence();", "", "fast_random"
    ),
    "fast: half a product's weights of another place": (
        FAST, "dwords[2 * s + 1][2 * j], dwords", "dwords[2 * s][2 * j], dwords", "fast_random"
    ),
    "fast: a slice's products replace the others": (
        FAST, "read_.tokens(s), s > 0);", "read_.tokens(s), false);", "fast_random"
    ),
    "fast: the scale of another row": (
        FAST, "of_rows[i / 2] *", "of_rows[i % 2] *", "fast_every_packing"
    ),
    "fast: the scale of another token": (
        FAST, "i % 2 ? two.y : two.x", "i / 2 ? two.y : two.x", "fast_random"
    ),
    "fast: the scales of another group of tokens": (
        PRODUCER, "+ chunk * kFloats;", "+ 0 * chunk;", "fast_every_packing"
    ),
    "fast: a group's codes do not fit its scale": (
        FAST, "most = larger(most, __shfl_xor_sync(kAllLanes, most, other));", "", "fast_random"
    ),
    "fast: the largest of h is not awaited": (
        FAST, "ptx::sync_some(1, kConsumers);", "", "fast_a_slow_warp"
    ),
    "fast: one place for the largest of two items": (
        FAST, "+ turn * kBlocks * kColumns;", "+ 0 * turn;", "fast_a_slow_warp"
    ),
    "fast: lanes read the largest of all before it is there": (
        FAST, "__syncwarp();  // the largest of all warps are there", "", "fast_every_packing"
    ),
    "fast: the largest of one warp": (
        FAST, "for (int w = 0; w < kBlocks; ++w)", "for (int w = 0; w < 1; ++w)",
        "fast_every_packing"
    ),
    "fast: the scale of h goes to another group": (
        FAST, "first_block / kBlocks]", "0 * first_block]", "fast_every_packing"
    ),
    "fast: rows of h change places": (
        FAST, "floats_to_e4m3(h[n][i] * by, h[n][2 + i] * by, 0, 0)",
        "floats_to_e4m3(h[n][2 + i] * by, h[n][i] * by, 0, 0)", "fast_random"
    ),
    "bf16: the wrong half": (
        "formats/bf16.cuh", "return dwords[half];", "return dwords[1 - half];", "stream_every_kind"
    ),
    "int8: the high bit is lost": (
        "formats/int8.cuh", "& 0x00800080u", "& 0x00000080u", "stream_every_kind"
    ),
    "fp8: the sign is lost": ("formats/fp8.cuh", "0x80008000u", "0u", "stream_every_kind"),
    "fp8: NaN is a number": (
        "formats/fp8.cuh", "is_nan * 15", "is_nan * 0", "stream_nan"
    ),
    "int4: nibbles in another order": (
        "formats/int4.cuh", "8 * slice + 4 * half", "8 * half + 4 * slice", "stream_every_kind"
    ),
    "mxfp4: twice as large": ("formats/mxfp4.cuh", "0x7e807e80u", "0x7f007f00u", "stream_every"),
    "scales: an exponent is off by one": (
        "scale.cuh", "Bf16::unpack(v.y, out + 2);", "Bf16::unpack(v.x, out + 2);",
        "stream_every_kind"
    ),
}  # fmt: skip
# So small that every problem goes in several chunks.
SMALL_WORKSPACE = (CALL, "int64_t(1) << 30", "int64_t(1) << 10")


def run(command: list[str], timeout: float) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, capture_output=True, text=True, timeout=timeout, check=False)


CPUS = len(os.sched_getaffinity(0))
Item, Result = TypeVar("Item"), TypeVar("Result")


def side_by_side(work: Callable[[Item], Result], items: Iterable[Item]) -> list[Result]:
    with ThreadPoolExecutor(CPUS) as pool:
        return list(pool.map(work, items))


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
        sources = [*(CUDA / name for name in SOURCES), *(EMULATOR / name for name in TESTS)]
        objects = side_by_side(lambda source: build.compile(source, ROOT / "csrc", folder), sources)
        build.objects.update(zip([source.name for source in sources], objects, strict=True))
        return build

    def compile(self, source: Path, csrc: Path, to: Path) -> Path:
        flags = (f"-I{self.folder}", "-include", "first.h", "-x", "c++", "-c")
        return compile_file(source, csrc, to / f"{source.name}.o", *flags)

    def program_with(
        self,
        changes: list[tuple[str, str, str]],
        folder: Path,
        test: str = "experts_test.cpp",
        compiled_in: dict[str, str] = COMPILED_IN,
    ) -> Path:
        """A test program, its changed files compiled from a copy of the sources."""
        csrc = folder / "csrc"
        shutil.copytree(CUDA, csrc / "cuda")
        for header in ("moe.h", "blocks.h", "status.h"):
            shutil.copy(ROOT / "csrc" / header, csrc)
        for name, old, new in changes:
            text = (csrc / "cuda" / name).read_text()
            assert text.count(old) == 1, f"{name} has {old!r} {text.count(old)} times"
            (csrc / "cuda" / name).write_text(text.replace(old, new))
        objects = {k: v for k, v in self.objects.items() if k == test or k not in TESTS}
        for name in {compiled_in.get(name, name) for name, _, _ in changes}:
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


@pytest.mark.parametrize("seed", soon("0", "012"))
@pytest.mark.parametrize("test", TESTS)
def test_kernels_and_host_side_are_right(
    test: str, seed: str, build: Build, tmp_path: Path
) -> None:
    program = build.program_with([], tmp_path, test)
    done = run([str(program), "--seed", seed], 300)
    assert done.returncode == 0, done.stdout + done.stderr
    assert " 0 failures" in done.stdout


@pytest.mark.slow
def test_every_line_of_kernel_code_is_run() -> None:
    if shutil.which("gcov") is None:
        pytest.skip("gcov is not installed")
    done = run([sys.executable, str(EMULATOR / "coverage.py")], 1800)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("test", [name for name in TESTS if name != "choice_test.cpp"])
def test_calls_larger_than_the_workspace_go_in_runs(
    test: str, build: Build, tmp_path: Path
) -> None:
    program = build.program_with([SMALL_WORKSPACE], tmp_path, test)
    done = run([str(program), "edge_shapes", "random_problems", "an_id_out_of_range"], 300)
    assert done.returncode == 0, done.stdout + done.stderr


def seed_that_notices(bug: str, build: Build, folder: Path) -> int | None:
    name, old, new, case = BUGS[bug]
    changes = [(name, old, new)] + ([SMALL_WORKSPACE] if name == CALL else [])
    test = OF_PACKED.get(case.partition("_")[0], "experts_test.cpp")
    where = COMPILED_IN
    if bug.startswith("wgmma, zeros"):
        where = {**where, HOPPER: "hopper_int4_zeros.cu"}
    if bug.startswith("fast"):
        where = {**where, **dict.fromkeys((PRODUCER, PARTS), "hopper_fp8_fast.cu")}
    program = build.program_with(changes, folder, test, where)
    for seed in range(4):  # a schedule that does no harm is possible
        if run([str(program), "--stop", "--seed", str(seed), case], 120).returncode != 0:
            return seed
    return None


@pytest.fixture(scope="module")
def verdicts(
    request: pytest.FixtureRequest, build: Build, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[dict[str, Future[int | None]]]:
    """By bug, of those this session tests, the seed that notices: worked out side by side."""
    items = [item for item in request.session.items if isinstance(item, pytest.Function)]
    bugs = [item.callspec.params["bug"] for item in items if "verdicts" in item.fixturenames]
    with ThreadPoolExecutor(CPUS) as pool:
        yield {
            bug: pool.submit(seed_that_notices, bug, build, tmp_path_factory.mktemp("bug"))
            for bug in bugs
        }
        pool.shutdown(cancel_futures=True)


# The first of each kind soon (what stands before the colon), all of them every night.
KINDS = {bug.partition(":")[0]: bug for bug in reversed(BUGS)}


@pytest.mark.parametrize("bug", soon(KINDS.values(), BUGS))
def test_a_planted_bug_is_found(bug: str, verdicts: dict[str, Future[int | None]]) -> None:
    assert verdicts[bug].result() is not None, f"nothing notices: {bug}"
