# SPDX-License-Identifier: Apache-2.0
"""The thread pool as its users meet it: forks, several callers, limits, and silence when idle."""

import os
import resource
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch

from expertyard import moe_experts
from expertyard.native import _C
from expertyard.testing import random_problem

PROBLEM = {  # large enough that a call uses more than one thread
    "num_tokens": 48,
    "hidden_size": 384,
    "intermediate_size": 192,
    "num_experts": 8,
    "top_k": 2,
}


def in_a_new_process(code: str, **environment: str) -> str:
    decides = ("EXPERTYARD_TEAM", "GOMP_SPINCOUNT", "OMP_WAIT_POLICY")
    inherited = {name: value for name, value in os.environ.items() if name not in decides}
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**inherited, **environment},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_several_python_threads_at_once() -> None:
    problems = [random_problem(**PROBLEM, seed=s) for s in range(4)]
    expected = [
        moe_experts(p.hidden_states, p.topk_ids, p.topk_weights, p.pack()) for p in problems
    ]
    wrong: list[int] = []

    def work(i: int) -> None:
        p = problems[i]
        packed = p.pack()
        for _ in range(50):
            out = moe_experts(p.hidden_states, p.topk_ids, p.topk_weights, packed)
            if not torch.equal(out, expected[i]):
                wrong.append(i)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for t in threads:
        t.start()
    for t in threads:
        t.join(timeout=60)
    assert not any(t.is_alive() for t in threads)
    assert wrong == []


def test_a_fork_after_use_computes_too() -> None:
    out = in_a_new_process(
        """
import os, torch
from expertyard import moe_experts
from expertyard.testing import random_problem
p = random_problem(num_tokens=48, hidden_size=384, intermediate_size=192, num_experts=8, top_k=2)
packed = p.pack()
run = lambda: moe_experts(p.hidden_states, p.topk_ids, p.topk_weights, packed)
expected = run()
child = os.fork()
if child == 0:
    os._exit(0 if torch.equal(run(), expected) else 1)
_, status = os.waitpid(child, 0)
print(status, torch.equal(run(), expected))
"""
    )
    assert out == "0 True"


two_cpus = pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="needs two CPUs")
# threads that a call has made: torch's are there before it, own workers are not
NEW_THREADS = """
import os, torch
torch.set_num_threads({n})
from expertyard import moe_experts
from expertyard.native import _C
from expertyard.testing import random_problem
torch.ones(1 << 22).sum()
p = random_problem(num_tokens=64, hidden_size=512, intermediate_size=256, num_experts=8, top_k=2)
packed = p.pack()
before = len(os.listdir("/proc/self/task"))
moe_experts(p.hidden_states, p.topk_ids, p.topk_weights, packed)
print(_C.team(), len(os.listdir("/proc/self/task")) - before)
"""


@two_cpus
def test_set_num_threads_is_honoured() -> None:
    """One thread asked for: no worker is ever made."""
    assert in_a_new_process(NEW_THREADS.format(n=1), EXPERTYARD_TEAM="own") == "own 0"
    assert in_a_new_process(NEW_THREADS.format(n=2), EXPERTYARD_TEAM="own") == "own 1"


@two_cpus
@pytest.mark.parametrize(
    ("torch_threads", "environment", "expected"),
    [
        (2, {}, "torch 0"),
        (2, {"GOMP_SPINCOUNT": "10000"}, "own 1"),  # they sleep soon: ours need not wait for them
        (2, {"OMP_WAIT_POLICY": "passive"}, "own 1"),
        (2, {"OMP_WAIT_POLICY": "passive", "EXPERTYARD_TEAM": "torch"}, "torch 0"),
        (32 * len(os.sched_getaffinity(0)), {}, "own "),  # more threads than CPUs: not all of them
    ],
)
def test_whose_threads_compute(
    torch_threads: int, environment: dict[str, str], expected: str
) -> None:
    found = in_a_new_process(NEW_THREADS.format(n=torch_threads), **environment)
    assert found.startswith(expected)


@pytest.mark.parametrize(
    ("before", "expected"),
    [
        ("", "10000"),
        ("os.environ['GOMP_SPINCOUNT'] = '7'", "7"),
        ("os.environ['OMP_WAIT_POLICY'] = 'active'", "None"),
        ("import torch", "None"),  # too late: OpenMP has read it
    ],
)
def test_the_command_bounds_openmps_spinning_unless_told(before: str, expected: str) -> None:
    code = f"""
import os
{before}
from expertyard.cli.run import spin_briefly
spin_briefly()
print(os.environ.get("GOMP_SPINCOUNT"))
"""
    assert in_a_new_process(code) == expected


def test_a_team_that_does_not_exist_is_refused() -> None:
    code = """
from expertyard import moe_experts
from expertyard.testing import random_problem
p = random_problem(num_tokens=1, hidden_size=64, intermediate_size=32, num_experts=4, top_k=2)
try:
    moe_experts(p.hidden_states, p.topk_ids, p.topk_weights, p.pack())
except Exception as error:
    print(type(error).__name__, error)
"""
    refused = in_a_new_process(code, EXPERTYARD_TEAM="mine")
    assert refused == "KernelError EXPERTYARD_TEAM: expected auto, torch or own, got 'mine'"


def test_a_fork_from_torchs_team_has_workers_of_its_own() -> None:
    out = in_a_new_process(
        """
import os, torch
from expertyard import moe_experts
from expertyard.native import _C
from expertyard.testing import random_problem
p = random_problem(num_tokens=48, hidden_size=384, intermediate_size=192, num_experts=8, top_k=2)
packed = p.pack()
run = lambda: moe_experts(p.hidden_states, p.topk_ids, p.topk_weights, packed)
torch.ones(1 << 22).sum()
expected = run()
child = os.fork()
if child == 0:
    os._exit(0 if torch.equal(run(), expected) and _C.team() == "own" else 1)
_, status = os.waitpid(child, 0)
print(status, torch.equal(run(), expected))
""",
        EXPERTYARD_TEAM="torch",
    )
    assert out == "0 True"


def test_affinity_limits_threads() -> None:
    code = """
import os, torch
os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
torch.set_num_threads(16)
from expertyard import moe_experts
from expertyard.native import _C
from expertyard.testing import random_problem
p = random_problem(num_tokens=64, hidden_size=512, intermediate_size=256, num_experts=8, top_k=2)
packed = p.pack()
before = len(os.listdir("/proc/self/task"))
moe_experts(p.hidden_states, p.topk_ids, p.topk_weights, packed)
print(_C.thread_limits()["usable"], len(os.listdir("/proc/self/task")) - before)
"""
    assert in_a_new_process(code) == "1 0"


def test_idle_workers_use_no_cpu() -> None:
    p = random_problem(**PROBLEM)
    packed = p.pack()
    for _ in range(20):
        moe_experts(p.hidden_states, p.topk_ids, p.topk_weights, packed)
    time.sleep(0.05)  # the bounded spin is over
    before = resource.getrusage(resource.RUSAGE_SELF)
    time.sleep(1.0)
    after = resource.getrusage(resource.RUSAGE_SELF)
    used = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    assert used < 0.1  # a spinning worker would have used a second


def test_a_forced_instruction_set_is_used_or_refused() -> None:
    code = """
import torch
from expertyard import moe_experts
from expertyard.testing import random_problem
p = random_problem(num_tokens=1, hidden_size=64, intermediate_size=32, num_experts=4, top_k=2)
packed = p.pack()
try:
    moe_experts(p.hidden_states, p.topk_ids, p.topk_weights, packed)
    print(packed.last_kernel)
except Exception as error:
    print(type(error).__name__, error)
"""
    assert in_a_new_process(code, EXPERTYARD_ISA="scalar") == "bf16_scalar"
    refused = in_a_new_process(code, EXPERTYARD_ISA="avx1024")
    assert refused.startswith("KernelError EXPERTYARD_ISA: no instruction set is called 'avx1024'")
    for isa in {k["isa"] for k in _C.kernels()}:
        assert isa in refused


def test_forcing_by_call_is_refused_for_unknown_names() -> None:
    with pytest.raises(ValueError, match="there are: "):
        _C.force_isa("mmx")
    assert _C.forced_isa() is None


def test_a_cgroup_quota_limits_threads() -> None:
    """A quota on the parent counts too; half a CPU is one thread. Needs a cgroup to write to."""
    version_1 = os.path.isdir("/sys/fs/cgroup/cpu")
    parent = Path("/sys/fs/cgroup/cpu" if version_1 else "/sys/fs/cgroup") / f"ey{os.getpid()}"
    child = parent / "child"
    try:
        child.mkdir(parents=True)
        if version_1:
            (parent / "cpu.cfs_period_us").write_text("100000")
            (parent / "cpu.cfs_quota_us").write_text("50000")
        else:
            (parent / "cpu.max").write_text("50000 100000")
    except OSError as error:
        if child.exists():
            child.rmdir()
        if parent.exists():
            parent.rmdir()
        pytest.skip(f"no cgroup to write to: {error}")
    try:
        out = in_a_new_process(
            f"""
import os
open("{child}/cgroup.procs", "w").write(str(os.getpid()))
import torch
from expertyard.native import _C
print(_C.thread_limits()["cgroup"], _C.thread_limits()["usable"])
"""
        )
    finally:
        child.rmdir()
        parent.rmdir()
    assert out == "1 1"
