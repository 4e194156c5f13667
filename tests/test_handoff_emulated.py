# SPDX-License-Identifier: Apache-2.0
"""The hand-off between GPU and CPU: its kernels under the emulator of tests/cuda_emulator, against
a real thread on the host's side; that between two GPUs, with streams that run in any order that
events allow. With a bug planted in them they do not pass."""

import shutil
import subprocess
from pathlib import Path

import pytest

from nightly import soon

ROOT = Path(__file__).resolve().parents[1]
CSRC = ROOT / "csrc"
EMULATOR = ROOT / "tests" / "cuda_emulator"
GXX = shutil.which("g++")
FLAGS = (
    *("-std=c++20", "-O1", "-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas", "-pthread"),
    '-DEXPERTYARD_CUDA_ARCHS="80-real"',
)
AWAY = ("handoff/away.cpp", "cuda/device.cu")
SOURCES = ("handoff/lane.cpp", "handoff/signal.cpp", "cpu/threads.cpp", "cuda/device.cu")

pytestmark = pytest.mark.skipif(GXX is None, reason="g++ is not installed")

# What is planted: the text as it is, the text with the bug, a case that must notice.
BUGS = {
    "the epoch is written before the question is whole": (
        "__syncthreads();  // the question is whole", "//", "every_shape"
    ),
    "threads write before the epoch is known": (
        "__syncthreads();  // the epoch is known", "//", "a_second_question"
    ),
    "the epoch is not written": (
        "if (threadIdx.x == 0) ptx::store_release_system(&a.box.words->asked, *epoch);", "",
        "an_answer_that_fails"
    ),
    "the epoch does not count": (
        "a.box.state->epoch = *epoch;", "", "a_graph_that_is_replayed"
    ),
    "an epoch is 0 when it wraps": (
        "a.box.state->epoch + 1 != 0 ? a.box.state->epoch + 1 : 1", "a.box.state->epoch + 1",
        "epochs_wrap"
    ),
    "a box that is taken is taken again": (
        "ptx::exchange(&a.box.state->busy, 1) == 0", "true", "a_second_question"
    ),
    "the box stays taken": ("ptx::exchange(&a.state->busy, 0)", "(void)0", "a_graph"),
    "the box is free after a time-out": (
        "if (*verdict == BoxReport::kTimedOut) a.state->late = 1;", "", "an_answer_that_comes_late"
    ),
    "threads read before the answer is there": (
        "__syncthreads();  // the answer is there, or never will be", "//", "every_shape"
    ),
    "the answer is not waited for": (
        "load_acquire_system(&a.words->answered) != ticket", "load_acquire_system("
        "&a.words->answered) == 0xfffffff0u", "an_answer_that_takes_its_time"
    ),
    "there is no time-out": ("return BoxReport::kTimedOut;", "{}", "an_answer_that_never_comes"),
    "an error is not seen": (
        "return failed ? BoxReport::kFailed", "return failed && false ? BoxReport::kFailed",
        "an_answer_that_fails"
    ),
    "nothing is reported": (
        "if (*verdict != BoxReport::kNone) report(a.words, ticket, *verdict);", "", "an_answer"
    ),
    "the GPU's share is left out": ("(a.share ? a.share[i] : 0.0f)", "0.0f", "every_shape"),
    "a wide id is cut": (
        "id == int32_t(id) ? int32_t(id) : INT32_MIN", "int32_t(id)", "ids_that_no_int32"
    ),
    "the tail of the hidden states is left out": (
        "i < bytes; i += int64_t(threads) * 2", "i < bytes - 2; i += int64_t(threads) * 2",
        "every_shape"
    ),
}  # fmt: skip
BRANCH_BUGS = {
    "the other GPU does not wait for the question": (
        "error = cudaStreamWaitEvent(aside, static_cast<cudaEvent_t>(b.sent), 0);", ""
    ),
    "nobody waits for the other GPU": (
        "static_cast<cudaEvent_t>(b.done), 0);", "static_cast<cudaEvent_t>(b.sent), 0);"
    ),
    "the other GPU does not say that it is done": (
        "error = cudaEventRecord(static_cast<cudaEvent_t>(b.done), aside);", "(void)aside;"
    ),
    "ids are taken for narrow ones": (
        "error = copy(b.topk_ids, args.topk_ids, pairs * (s.ids_are_int64 ? 8 : 4));",
        "error = copy(b.topk_ids, args.topk_ids, pairs * 4);",
    ),
    "the other GPU reads our memory": ("there.topk_weights = b.topk_weights;", ""),
    "a branch's memory stays": ("cudaFree(memory);", "(void)memory;"),
}  # fmt: skip


def run(command: list[str], timeout: float) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, capture_output=True, text=True, timeout=timeout, check=False)


def compile_file(source: Path, output: Path, csrc: Path = CSRC) -> Path:
    includes = [f"-I{csrc}", f"-I{csrc / 'cuda'}", f"-I{CSRC}", f"-I{CSRC / 'cuda'}"]
    done = run(
        [str(GXX), *FLAGS, *includes, f"-I{EMULATOR}", "-x", "c++", "-c", str(source),
         "-o", str(output)], 240
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return output


@pytest.fixture(scope="module")
def others(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("handoff")
    sources = [*(CSRC / name for name in SOURCES), EMULATOR / "handoff_test.cpp"]
    return [compile_file(source, folder / f"{source.name}.o") for source in sources]


def program(others: list[Path], folder: Path, change: tuple[str, str] | None = None) -> Path:
    csrc = folder / "csrc"
    (csrc / "cuda").mkdir(parents=True)
    for name in ("handoff.cuh", "handoff.cu"):
        shutil.copy(CSRC / "cuda" / name, csrc / "cuda")
    for name in ("moe.h", "blocks.h", "status.h"):  # what ../NAME means there
        shutil.copy(CSRC / name, csrc)
    if change is not None:
        old, new = change
        text = (csrc / "cuda/handoff.cuh").read_text()
        assert text.count(old) == 1, f"handoff.cuh has {old!r} {text.count(old)} times"
        (csrc / "cuda/handoff.cuh").write_text(text.replace(old, new))
    made = compile_file(csrc / "cuda/handoff.cu", folder / "handoff.o", csrc)
    done = run(
        [str(GXX), "-pthread", str(made), *map(str, others), "-o", str(folder / "program")], 60
    )
    assert done.returncode == 0, done.stderr
    return folder / "program"


def test_questions_and_answers(others: list[Path], tmp_path: Path) -> None:
    made = program(others, tmp_path)
    for seed in ("0", "1", "2"):
        done = run([str(made), "--seed", seed], 120)
        assert done.returncode == 0, done.stdout + done.stderr
        assert " 0 failures" in done.stdout


@pytest.mark.parametrize("bug", soon([*BUGS][::4], BUGS))
def test_a_planted_bug_is_found(bug: str, others: list[Path], tmp_path: Path) -> None:
    old, new, case = BUGS[bug]
    made = program(others, tmp_path, (old, new))
    for seed in ("0", "1"):
        try:
            done = run([str(made), "--stop", "--seed", seed, case], 8)
        except subprocess.TimeoutExpired:
            continue  # it hangs: that is noticed too
        assert done.returncode != 0, f"seed {seed} does not notice: {bug}"


@pytest.fixture(scope="module")
def away(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("away")
    sources = [*(CSRC / name for name in AWAY), EMULATOR / "branch_test.cpp"]
    return [compile_file(source, folder / f"{source.name}.o") for source in sources]


def branch_program(away: list[Path], folder: Path, change: tuple[str, str] | None = None) -> Path:
    text = (CSRC / "cuda/branch.cu").read_text()
    if change is not None:
        assert text.count(change[0]) == 1, f"branch.cu has {change[0]!r} {text.count(change[0])} x"
        text = text.replace(*change)
    (folder / "branch.cu").write_text(text)
    made = compile_file(folder / "branch.cu", folder / "branch.o")
    done = run([str(GXX), "-pthread", str(made), *map(str, away), "-o", str(folder / "it")], 60)
    assert done.returncode == 0, done.stderr
    return folder / "it"


def test_parts_on_another_gpu(away: list[Path], tmp_path: Path) -> None:
    made = branch_program(away, tmp_path)
    for seed in map(str, range(10)):
        done = run([str(made), "--seed", seed], 120)
        assert done.returncode == 0, done.stdout + done.stderr
        assert " 0 failures" in done.stdout


@pytest.mark.parametrize("bug", soon([*BRANCH_BUGS][:2], BRANCH_BUGS))
def test_a_bug_planted_between_two_gpus_is_found(
    bug: str, away: list[Path], tmp_path: Path
) -> None:
    made = branch_program(away, tmp_path, BRANCH_BUGS[bug])
    assert run([str(made), "--seed", "0"], 60).returncode != 0, f"nobody notices: {bug}"


def test_the_cpus_end_of_a_hand_off(others: list[Path], tmp_path: Path) -> None:
    own = [
        compile_file(source, tmp_path / f"{source.name}.o")
        for source in (
            CSRC / "cuda/handoff.cu", CSRC / "handoff/desk.cpp", EMULATOR / "desk_test.cpp"
        )
    ]  # fmt: skip
    shared = [made for made in others if made.name != "handoff_test.cpp.o"]
    made = tmp_path / "program"
    done = run([str(GXX), "-pthread", *map(str, [*own, *shared]), "-o", str(made)], 60)
    assert done.returncode == 0, done.stderr
    for seed in ("0", "1"):
        done = run([str(made), "--seed", seed], 120)
        assert done.returncode == 0, done.stdout + done.stderr
        assert " 0 failures" in done.stdout
