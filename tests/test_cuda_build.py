# SPDX-License-Identifier: Apache-2.0
"""The CUDA side of the native module, on any machine: it imports, says in a sentence why it cannot
run, and what nvcc makes of the kernels neither spills nor outgrows its register budget."""

import importlib.util
import re
import shutil
import subprocess
import sysconfig
from pathlib import Path

import pytest
import torch

from expertyard.native import _C

ROOT = Path(__file__).resolve().parents[1]
ARCHITECTURES = ("80", "86", "89", "90a", "100", "120")
# Registers a thread at most. A multiprocessor has 65536: 4 blocks of 256 threads for the rows, at
# least 2 of 128 for the tiles, where shared memory allows no third on most cards.
MOST_REGISTERS = {
    "experts_rows.cu": {"gate_up_rows": 64, "down_rows": 64},
    "experts_tiles.cu": {"gate_up_tiles": 168, "down_tiles": 168, "route": 64, "combine": 64},
}


def test_status_says_why_there_is_no_gpu() -> None:
    status = _C.cuda_status()
    assert status["usable"] == (status["why"] is None) == (len(status["devices"]) > 0)
    assert status["built"] == bool(_C.build["cuda"])
    if not status["built"]:
        assert "no nvcc when it was built" in status["why"]
    elif status["driver_version"] == 0:
        assert re.fullmatch(
            r"no NVIDIA driver on this machine \(CUDA error 35: .*\); "
            "the CPU kernels work without one",
            status["why"],
        )
    for device in status["devices"]:
        assert device["usable"] == (device["why"] is None)


@pytest.mark.skipif(_C.cuda_status()["usable"], reason="this machine has a GPU")
def test_experts_on_a_gpu_that_is_not_there_are_refused_with_the_same_sentence() -> None:
    why = _C.cuda_status()["why"]
    assert _C.cuda_problem(0) == why
    with pytest.raises(ValueError, match=re.escape(why)):
        _C.add_experts(
            format="bf16", activation="silu", alpha=1.0, limit=1.0, hidden_size=8,
            intermediate_size=8, gate_up_row_stride=16, down_row_stride=16,
            pointers=[(0, 0, 0, 0, 0, 0)], device=0,
        )  # fmt: skip


def test_the_op_is_there_for_both_devices() -> None:
    for key in ("CPU", "CUDA"):
        assert torch._C._dispatch_has_kernel_for_dispatch_key("expertyard::moe_experts", key)


def find_tool(name: str) -> str | None:
    """A CUDA tool from PATH, /usr/local/cuda, or a wheel (nvidia-cuda-*, triton)."""
    folders = [Path("/usr/local/cuda/bin")]
    site = Path(sysconfig.get_path("purelib"))
    folders += [*site.glob("nvidia/cu*/bin"), *site.glob("nvidia/*/bin")]
    if importlib.util.find_spec("triton"):
        folders += [*site.glob("triton/backends/nvidia/bin")]
    path = ":".join(map(str, folders))
    return shutil.which(name) or shutil.which(name, path=path)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("source", MOST_REGISTERS)
def test_no_kernel_spills_or_exceeds_its_registers(
    architecture: str, source: str, tmp_path: Path
) -> None:
    nvcc = find_tool("nvcc")
    if nvcc is None:
        pytest.skip("nvcc is not installed")
    known = subprocess.run([nvcc, "--list-gpu-code"], capture_output=True, text=True, check=True)
    if f"sm_{architecture.rstrip('a')}" not in known.stdout.split():
        pytest.skip(f"this nvcc has no sm_{architecture}")
    report = subprocess.run(
        [
            nvcc, "-std=c++17", "-O3", "-cubin", "-Xptxas=-v",
            f"-gencode=arch=compute_{architecture},code=sm_{architecture}",
            str(ROOT / "csrc/cuda" / source), "-o", str(tmp_path / "out.cubin"),
        ],
        capture_output=True, text=True, timeout=120, check=True,
    ).stderr  # fmt: skip
    kernels = re.findall(
        r"Compiling entry function '(\w+)'.*?(\d+) bytes stack frame, (\d+) bytes spill stores, "
        r"(\d+) bytes spill loads.*?Used (\d+) registers",
        report,
        re.DOTALL,
    )
    seen = set()
    for mangled, stack, stores, loads, registers in kernels:
        assert (stack, stores, loads) == ("0", "0", "0"), mangled
        (name,) = [k for k in MOST_REGISTERS[source] if f"{len(k)}{k}" in mangled]
        assert int(registers) <= MOST_REGISTERS[source][name], (mangled, registers)
        seen.add(name)
    assert seen == set(MOST_REGISTERS[source]), report


def test_the_machine_code_loads_16_bytes_at_a_time_and_uses_tensor_cores() -> None:
    cuobjdump = find_tool("cuobjdump")
    if not _C.build["cuda"] or cuobjdump is None:
        pytest.skip("no CUDA in this build, or cuobjdump is not installed")
    done = subprocess.run(
        [cuobjdump, "-sass", str(Path(_C.__file__))], capture_output=True, text=True, check=True
    )
    functions = done.stdout.split("Function :")[1:]
    assert functions
    for function in functions:
        name = function.split("\n", 1)[0]
        assert not re.search(r"\b(STL|LDL)\b", function), name
        if "_rows" in name or "_tiles" in name:
            assert re.search(r"\bLDG(STS)?\.E\.(\w+\.)*128", function), name
        if "_tiles" in name:
            assert re.search(r"\bHMMA\.16816\.F32\.BF16", function), name
