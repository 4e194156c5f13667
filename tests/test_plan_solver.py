# SPDX-License-Identifier: Apache-2.0
"""The solver finds the best of all cuts, keeps experts with their layers where that is free, and is
fast.
"""

import itertools
import random
import time
from typing import Any

import pytest

from expertyard import ModelSpec, Request, make_plan
from expertyard.errors import PlanError
from expertyard.memory import GiB, MiB, default_reserve, workspace_bytes
from expertyard.plan import Plan
from plan_helpers import experts, homes, plan

CONFIG = {
    "model_type": "qwen3_moe", "num_hidden_layers": 5, "hidden_size": 2048, "vocab_size": 32000,
    "num_attention_heads": 32, "num_key_value_heads": 4, "head_dim": 128, "intermediate_size": 6144,
    "moe_intermediate_size": 1024, "num_experts": 6, "num_experts_per_tok": 2,
    "mlp_only_layers": [0],
}  # fmt: skip
SMALL = ModelSpec.from_config(CONFIG, "small")


def reading(made: Plan) -> float:
    return made.seconds_per_token


def best_by_trying(
    memory: dict[str, int], speed: dict[str, float], weights: list[list[float]]
) -> float:
    """Seconds a token of the best cut, by trying every cut with every place for what is outside."""
    gpus = sorted((d for d in memory if d != "cpu"), key=lambda d: -speed[d])
    sizes = [layer.dense_bytes("bf16") + layer.kv_bytes(4096, 1) for layer in SMALL.layers]
    shape = SMALL.layers[1].experts
    assert shape is not None
    slot = shape.bytes("bf16")
    queue = sorted((w for row in weights for w in row), reverse=True)
    embedding, head, norm = 2 * 32000 * 2048, 2 * 32000 * 2048, 2 * 2048
    best = float("inf")
    cuts = itertools.combinations_with_replacement(range(len(sizes) + 1), len(gpus))
    for ends, base in itertools.product(list(cuts), [*gpus, "cpu"]):
        begin, rest, time_taken, fits = 0, list(queue), 0.0, True
        for gpu, end in zip(gpus, ends, strict=True):
            dense = sum(sizes[begin:end])
            own = head + norm if gpu == base else 0
            room = memory[gpu] - default_reserve(memory[gpu]) - dense - own
            room -= embedding if gpu == base else 0
            room -= workspace_bytes(SMALL, 4096, 1, gpu == base)
            fits &= room >= 0 or (begin == end and gpu != base)
            taken = [rest.pop(0) for _ in range(min(max(room, 0) // slot, len(rest)))]
            time_taken += (dense + own + slot * sum(taken)) / speed[gpu]
            begin = end
        left = sum(sizes[begin:]) + slot * sum(rest) + (head + norm if base == "cpu" else 0)
        if fits:
            best = min(best, time_taken + left / speed["cpu"])
    return best


@pytest.mark.parametrize("seed", range(40))
def test_no_cut_is_better_than_the_one_found(seed: int) -> None:
    """`one` candidates, which have no reserve, may even be better than every cut."""
    draw = random.Random(seed)
    gpus = draw.randint(1, 3)
    memory = {f"cuda:{i}": draw.randint(700, 1400) * MiB for i in range(gpus)}
    memory["cpu"] = 99 * GiB
    speed = {f"cuda:{i}": draw.choice([500e9, 900e9, 2e12]) for i in range(gpus)} | {"cpu": 60e9}
    weights = [[2 / 6] * 6 for _ in range(4)]
    request: dict[str, Any] = {"memory": memory, "bandwidth": speed}
    if seed % 2:
        counts = [[draw.paretovariate(1.0) for _ in range(6)] for _ in range(4)]
        weights = [[min(2 * c / sum(row), 1.0) for c in row] for row in counts]
        request["profile"] = counts
    found = make_plan(SMALL, Request(**request))
    assert reading(found) <= best_by_trying(memory, speed, weights) * (1 + 1e-8)


def remote(made: Plan) -> int:
    """Experts on a GPU that is not their layer's."""
    return sum(
        len(group.ids)
        for layer in made.layers
        for group in layer.experts or ()
        if group.device not in ("cpu", layer.device)
    )


@pytest.mark.parametrize("memory", ["cuda:0=40GiB,cuda:1=40GiB", "cuda:0=24GiB,cuda:1=16GiB"])
def test_experts_stay_with_their_layers_on_gpus_of_one_speed(memory: str) -> None:
    assert remote(plan("Qwen3-30B-A3B", memory=f"{memory},cpu=99GiB")) == 0
    assert remote(plan("GLM-4.5-Air", format="int4", memory=f"{memory},cpu=99GiB")) == 0


def test_fast_gpus_are_full_before_slow_ones_get_anything() -> None:
    made = plan(
        "OLMoE",
        memory="cuda:0=8GiB,cuda:1=8GiB,cpu=64GiB",
        bandwidth="cuda:0=500GB,cuda:1=2000GB",
    )
    assert set(homes(made)) == {"cuda:1"} and made.devices["cuda:1"].free < 12 * MiB
    assert any("cuda:0" in experts(made, i) for i in range(16))


def test_a_gpu_slower_than_the_cpu_is_used_only_where_the_cpu_is_full() -> None:
    slow = {"cuda:0": 100e9, "cpu": 400e9}
    roomy = plan("OLMoE", memory="cuda:0=24GiB,cpu=64GiB", bandwidth=slow)
    assert set(homes(roomy)) == {"cpu"} and roomy.devices["cuda:0"].used == 0
    tight = plan("OLMoE", memory="cuda:0=24GiB,cpu=8GiB", bandwidth=slow)
    assert tight.devices["cuda:0"].used > 0


def test_without_a_cpu_everything_is_on_gpus_or_an_error() -> None:
    made = plan("OLMoE", memory="cuda:0=10GiB,cuda:1=10GiB")
    assert "cpu" not in made.devices and set(homes(made)) <= {"cuda:0", "cuda:1"}
    with pytest.raises(PlanError, match=r"cpu needs .* and has 0.00 GiB"):
        plan("OLMoE", memory="cuda:0=4GiB")


@pytest.mark.parametrize("bandwidth", [None, "unequal"])
@pytest.mark.parametrize("profile", [False, True])
def test_kimi_over_eight_unequal_gpus_does_not_take_seconds(
    bandwidth: str | None, profile: bool
) -> None:
    spec = ModelSpec.from_family("Kimi-K2")
    sizes, speeds = (80, 24, 48, 16, 24, 80, 40, 12), (3300, 1000, 900, 700, 1800, 3300, 900, 300)
    memory = {f"cuda:{i}": size * GiB for i, size in enumerate(sizes)} | {"cpu": 2000 * GiB}
    request = Request(
        memory=memory,
        format="int4",
        bandwidth={f"cuda:{i}": s * 1e9 for i, s in enumerate(speeds)} if bandwidth else None,
        profile=[[1 + (e * 7919) % 384 for e in range(384)] for _ in spec.moe_layers]
        if profile
        else None,
    )
    times = []
    for _ in range(3):  # other processes on the machine slow single runs
        start = time.process_time()
        make_plan(spec, request)
        times.append(time.process_time() - start)
    assert min(times) < 2  # 0.2 to 0.6 s of processor time; a worse algorithm takes minutes
