# SPDX-License-Identifier: Apache-2.0
"""Experts in several processes: one process's results; a dead or silent one is a sentence."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

import expertyard as ey
from expertyard.errors import DeviceError

pytest.importorskip("transformers")
SLOW = pytest.mark.slow

# Each process: `python worker.py RANK SIZE FOLDER WHAT`. Expert e of each layer is rank e % SIZE's,
# but the last two, which each process has for itself.
WORKER = r"""
import json, os, re, signal, sys, time
import torch, torch.distributed as dist
from transformers import AutoModelForCausalLM
import expertyard as ey
from expertyard.dispatch.parallel import Shared
from expertyard.models import tiny_moe

rank, size, folder, what = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], sys.argv[4]
torch.set_num_threads(1)
dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=size)
rules = []
memory = {"cpu": "1GiB"}
for r in range(size):
    ids = "|".join(str(e) for e in range(14) if e % size == r)
    where = {"generate_device": f"rank{r}/cpu", "generate_op": "KExpertsCPU"}
    rules.append({"match": {"name": rf"^model\.layers\..*\.mlp\.experts\.({ids})$"},
                  "replace": {"class": "KTransformersExperts", "kwargs": where}})
    memory[f"rank{r}/cpu"] = "1GiB"
rules.append({"match": {"name": r"^model\.layers\..*\.mlp\.experts\.1[45]$"},
              "replace": {"class": "KTransformersExperts", "kwargs": {"generate_device": "cpu"}}})
tokens = "own" if what == "own" else "same"
timeout = float(sys.argv[5])
config = ey.ExpertsConfig(rules=rules, memory=memory, timeout=timeout, tokens=tokens)
model = AutoModelForCausalLM.from_pretrained(
    tiny_moe(), dtype=torch.float32, quantization_config=config
).eval()
found = {}
begin = time.time()
prompt = torch.tensor([[256, *b"The function returns"]])
if what == "own":
    prompt = torch.tensor([[256, *b"The function returns a list"[: 9 + 3 * rank]]])
try:
    if what == "same":
        found["devices"] = sorted({row.device for row in ey.verify(model).layers})
    with torch.no_grad():
        if what == "late" and rank == 0:
            os.kill(os.getpid(), signal.SIGSTOP)  # the test lets it go on
        if what in ("die", "hang", "late"):
            model(prompt)
            if rank == size - 1 and what != "late":
                os.kill(os.getpid(), signal.SIGKILL if what == "die" else signal.SIGSTOP)
            begin = time.time()
            for _ in range(10 if what == "late" else 1_000_000):
                model(prompt)
        logits = model(prompt).logits
        found["logits"] = logits.tolist()
        if what == "same":
            out = model.generate(prompt, max_new_tokens=12, do_sample=False)
            found["tokens"] = out[0].tolist()
except Exception as error:
    found["error"] = f"{type(error).__name__}: {error}"
    found["seconds"] = time.time() - begin
    try:
        model(prompt)
    except Exception as again:
        found["again"] = f"{type(again).__name__}: {again}"
    with open(f"{folder}/{rank}.error", "w") as file:
        file.write("it waits for the others to see the error too")
    while what == "die" and len([f for f in os.listdir(folder) if f.endswith(".error")]) < size - 1:
        time.sleep(0.05)
group = model.model.layers[0].mlp.experts.experts.group
found["ways"], found["bytes"] = group.shared.ways, group.shared.bytes
with open(f"{folder}/{rank}.json", "w") as file:
    json.dump(found, file)
os._exit(0)  # what is left of a broken group waits at exit
"""


def start(size: int, folder: Path, what: str, timeout: float = 120) -> list[subprocess.Popen[str]]:
    """timeout: of the library. Long, where nothing hangs: a machine may have other work to do."""
    file = folder / "worker.py"
    file.write_text(WORKER)
    return [
        subprocess.Popen(
            [sys.executable, str(file), str(rank), str(size), str(folder), what, str(timeout)],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        for rank in range(size)
    ]


def finish(
    processes: list[subprocess.Popen[str]], folder: Path, ranks: int
) -> list[dict[str, Any]]:
    found = []
    for rank in range(ranks):
        _, err = processes[rank].communicate(timeout=240)
        assert (folder / f"{rank}.json").is_file(), err
        found.append(json.loads((folder / f"{rank}.json").read_text()))
    return found


def expected(prompts: list[bytes]) -> tuple[list[Any], list[int]]:
    import torch
    from transformers import AutoModelForCausalLM

    from expertyard.models import tiny_moe

    model = AutoModelForCausalLM.from_pretrained(tiny_moe(), dtype=torch.float32).eval()
    ids = [torch.tensor([[256, *prompt]]) for prompt in prompts]
    with torch.no_grad():
        logits = [model(one).logits for one in ids]
        tokens = model.generate(ids[0], max_new_tokens=12, do_sample=False)
    return logits, tokens[0].tolist()


@pytest.mark.parametrize("size", [2, 4])
def test_processes_together_compute_what_one_does(size: int, tmp_path: Path) -> None:
    import torch

    found = finish(start(size, tmp_path, "same"), tmp_path, size)
    (logits,), tokens = expected([b"The function returns"])
    for rank, one in enumerate(found):
        torch.testing.assert_close(torch.tensor(one["logits"]), logits, rtol=1e-5, atol=2e-5)
        assert one["logits"] == found[0]["logits"], "the same bits everywhere"
        assert one["tokens"] == tokens
        assert one["devices"] == ["cpu", f"rank{rank}/cpu"]
    ways = found[0]["ways"]
    assert ways.get("rows", 0) > 0
    if size == 4:  # two experts of a token in two of four processes: as many bytes either way
        assert sum(ways.values()) > 0


@pytest.mark.parametrize("size", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_each_process_may_have_tokens_of_its_own(size: int, tmp_path: Path) -> None:
    import torch

    found = finish(start(size, tmp_path, "own"), tmp_path, size)
    text = b"The function returns a list"
    logits, _ = expected([text[: 9 + 3 * rank] for rank in range(size)])
    for one, wanted in zip(found, logits, strict=True):
        torch.testing.assert_close(torch.tensor(one["logits"]), wanted, rtol=1e-5, atol=2e-5)
        assert one["ways"].get("all_to_all", 0) > 0


@pytest.mark.parametrize("size", [2, pytest.param(4, marks=SLOW)])
def test_a_process_that_dies_is_a_sentence_on_the_others_at_once(size: int, tmp_path: Path) -> None:
    """Not when the time is over: each that notices lets go of the others, and stays alive here."""
    for rank, one in enumerate(gone(start(size, tmp_path, "die"), tmp_path, size - 1)):
        assert re.search(rf"DeviceError: Layer \d: rank{rank} of {size} cannot reach", one["error"])
        assert "start all of them again" in one["error"]
        assert one["again"] == one["error"], "and stays one"
        assert one["seconds"] < 60  # of 120


@SLOW
def test_a_process_that_hangs_is_a_sentence_when_the_time_is_over(tmp_path: Path) -> None:
    (one,) = gone(start(2, tmp_path, "hang", timeout=10), tmp_path, 1)
    assert "DeviceError: Layer 0: rank0 of 2 cannot reach" in one["error"]
    assert "The time-out is 10 s" in one["error"] and one["seconds"] >= 9


@SLOW
def test_a_process_that_is_stopped_for_a_while_is_waited_for(tmp_path: Path) -> None:
    processes = start(2, tmp_path, "late")
    try:
        while not is_stopped(processes[0].pid):
            assert processes[0].poll() is None, processes[0].communicate()
            time.sleep(0.1)
        time.sleep(3)
        os.kill(processes[0].pid, signal.SIGCONT)
        found = finish(processes, tmp_path, 2)
    finally:
        for process in processes:
            process.kill()
    assert found[0]["logits"] == found[1]["logits"]


def is_stopped(pid: int) -> bool:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "T"


def gone(processes: list[subprocess.Popen[str]], folder: Path, ranks: int) -> list[dict[str, Any]]:
    try:
        return finish(processes, folder, ranks)
    finally:
        for process in processes:
            process.kill()


def test_a_plan_for_processes_that_are_not_there_is_a_sentence() -> None:
    import torch
    from transformers import AutoModelForCausalLM

    from expertyard.models import tiny_moe

    config = ey.ExpertsConfig(
        override_tensor=r"exps=rank3/cpu", memory={"cpu": "1GiB", "rank3/cpu": "1GiB"}
    )
    with pytest.raises(DeviceError, match=r"torch\.distributed is not initialised"):
        AutoModelForCausalLM.from_pretrained(
            tiny_moe(), dtype=torch.float32, quantization_config=config
        )
