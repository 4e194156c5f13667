# SPDX-License-Identifier: Apache-2.0
"""The CUDA side of the native module, on any machine: it imports, says in a sentence why it cannot
run, and what nvcc makes of the kernels neither spills nor outgrows its register budget."""

import importlib.util
import os
import re
import shutil
import subprocess
import sysconfig
from pathlib import Path

import pytest
import torch

from expertyard.native import _C
from nightly import soon

# Registers a thread at most, by kernel. A multiprocessor has 65536: 4 blocks of 256 threads for the
# rows, 2 of 128 for the tiles, one of 256 for the packed kernels, which fill shared memory alone.
MOST_REGISTERS = {
    "gate_up_rows": 64,
    "down_rows": 64,
    "gate_up_tiles": 168,
    "down_tiles": 168,
    "route": 64,
    "prepare": 64,
    "combine": 64,
    "experts_stream": 160,
    "experts_grouped": 255,
    "ring": 64,  # of the hand-off to the CPU
    "collect": 64,
    "experts_wgmma": 168,  # 384 threads; setmaxnreg then shares them out: 40 and 232
    "experts_wgmma_fast": 168,
    "prepare_e4m3": 64,
    "sum_groups": 64,
}
# What is unrolled over all columns of a tile where it need not be does not fit into any cache.
MOST_INSTRUCTIONS = {
    "gate_up_tiles": 6_000,
    "experts_stream": 6_000,
    "experts_grouped": 10_000,
    "experts_wgmma": 10_000,
    "experts_wgmma_fast": 10_000,
}
FORMATS = ("Bf16Blocks", "Int8Blocks", "Fp8Blocks", "Int4Blocks", "Mxfp4Blocks")
HOPPER_FORMATS = ("Int4ZerosBlocks", "Fp8FastBlocks")
ON_HOPPER = {"experts_wgmma", "experts_wgmma_fast", "prepare_e4m3"}


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


@pytest.fixture(scope="module")
def cuobjdump() -> str:
    tool = find_tool("cuobjdump")
    if not _C.build["cuda"]:
        pytest.skip("no CUDA in this build")
    if tool is None:
        pytest.skip("no cuobjdump: pip install 'nvidia-cuda-cuobjdump==13.*'")
    return tool


def of_module(cuobjdump: str, *what: str) -> str:
    folders = {str(Path(tool).parent) for tool in (cuobjdump, find_tool("nvdisasm")) if tool}
    path = os.pathsep.join([*folders, os.environ.get("PATH", "")])  # it calls nvdisasm by name
    command = [cuobjdump, *what, str(Path(_C.__file__))]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PATH": path})
    assert done.returncode == 0, done.stderr
    return done.stdout


def kernel_of(mangled: str) -> str:
    (name,) = [k for k in MOST_REGISTERS if f"{len(k)}{k}" in mangled]
    return name


def test_no_kernel_spills_or_exceeds_its_registers(cuobjdump: str) -> None:
    """On any architecture that this build has code for. Spills would be local memory or a stack."""
    report = of_module(cuobjdump, "-res-usage")
    kernels = re.findall(
        r"Function (\w+):\s+REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)", report
    )
    seen = set()
    for mangled, registers, stack, _, local in kernels:
        name = kernel_of(mangled)
        assert (stack, local) == ("0", "0"), mangled
        assert int(registers) <= MOST_REGISTERS[name], (mangled, registers)
        seen |= {name, *(f for f in (*FORMATS, *HOPPER_FORMATS) if f in mangled)}
    architectures = str(_C.build["cuda_architectures"]).split()
    everything = {*MOST_REGISTERS, *FORMATS, *HOPPER_FORMATS}
    hopper = "90a-real" in architectures
    assert seen == (everything if hopper else everything - ON_HOPPER - {*HOPPER_FORMATS})
    # 4 kernels of each packed format, and the same on every architecture; 7 more on Hopper,
    # and of int4 with zeros two
    packed = [m for m, *_ in kernels if any(f in m for f in FORMATS)]
    assert len(packed) == 4 * len(FORMATS) * len(architectures) + 7 * hopper
    assert sum("Int4ZerosBlocks" in m for m, *_ in kernels) == 2 * hopper


ARCHITECTURES = [name.removesuffix("-real") for name in str(_C.build["cuda_architectures"]).split()]
SOON = {*ARCHITECTURES[:1], "90a"}  # to disassemble one takes 20 s and more


@pytest.mark.parametrize("architecture", soon(SOON, ARCHITECTURES))
def test_the_machine_code_loads_16_bytes_at_a_time_and_uses_tensor_cores(
    cuobjdump: str, architecture: str
) -> None:
    if find_tool("nvdisasm") is None:
        pytest.skip("no nvdisasm: pip install 'nvidia-cuda-nvdisasm==13.*'")
    functions = of_module(cuobjdump, "-arch", f"sm_{architecture}", "-sass").split("Function :")[1:]
    assert functions
    for function in functions:
        lint(function)


def lint(function: str) -> None:
    mangled = function.split("\n", 1)[0].strip()
    name = kernel_of(mangled)
    assert not re.search(r"\b(STL|LDL)\b", function), mangled
    if "rows" in name or "tiles" in name:
        assert re.search(r"\bLDG(STS)?\.E\.(\w+\.)*128", function), mangled
    if name in ("experts_wgmma", "experts_wgmma_fast"):
        lint_wgmma(function, mangled)
        return
    if name.startswith("experts_"):  # packed: weights past L1, in 16-byte pieces
        assert re.search(r"\bLDGSTS\.E\.BYPASS\.(\w+\.)*128", function), mangled
        assert re.search(r"\bLDS\.128", function), mangled
    if "tiles" in name or name.startswith("experts_"):
        assert re.search(r"\bHMMA\.16816\.F32\.BF16", function), mangled
    if name.startswith("experts_") and "Bf16Blocks" not in mangled:  # exact weights in pairs
        assert re.search(r"\bH(FMA2|ADD2|MUL2)\.(\w+\.)*BF16", function), mangled
    most = MOST_INSTRUCTIONS.get(name)
    count = len(re.findall(r"^ +/\*[0-9a-f]{4,}\*/", function, re.M))
    assert most is None or 0 < count <= most, (mangled, count)


def lint_wgmma(function: str, mangled: str) -> None:
    """Weights by bulk copies, tokens by 16-byte ones, products that are not done one by one."""
    assert "UBLKCP" in function, mangled
    assert re.search(r"\bLDGSTS\.E\.BYPASS\.(\w+\.)*128", function), mangled
    assert re.search(r"\bSTG\.E\.(\w+\.)*128", function), mangled  # y
    assert "USETMAXREG.TRY_ALLOC" in function and "USETMAXREG.DEALLOC" in function, mangled
    fast = "Fp8FastBlocks" in mangled
    product = r"\bQGMMA\.64x128x32\.F32\.E4M3\.E4M3" if fast else r"\bHGMMA\.64x128x16\.F32\.BF16"
    products = len(re.findall(product, function))
    if fast:  # tokens' scales, and nothing that turns weights into another type
        assert re.search(r"\bLDGSTS\.E\s", function), mangled
        assert not re.search(r"\bHFMA2", function), mangled
    # A compiler that cannot follow the registers (C7510 and its like) waits for each product.
    waits = len(re.findall(r"\bWARPGROUP\.DEPBAR\.LE gsb0, 0x0", function))
    assert products >= 4 and 2 * waits <= products, (mangled, products, waits)
