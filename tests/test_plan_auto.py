# SPDX-License-Identifier: Apache-2.0
"""Automatic placement: GPUs first, then the CPU; dense parts before experts; reserves as the page
says.
"""

from typing import Any

import pytest

from expertyard import ModelSpec, Request, make_plan
from expertyard.errors import ConfigError, PlanError
from expertyard.memory import GiB, MiB
from expertyard.plan import Plan

OLMOE = ModelSpec.from_family("OLMoE")  # 12 GiB of experts, under 1 GiB of the rest
QWEN = ModelSpec.from_family("Qwen3-30B-A3B")
V3 = ModelSpec.from_family("DeepSeek-V3")


def plan(spec: ModelSpec, memory: Any, **more: Any) -> Plan:
    return make_plan(spec, Request(memory=memory, **more))


def counts(made: Plan) -> dict[str, int]:
    found: dict[str, int] = {}
    for layer in made.layers:
        for group in layer.experts or ():
            found[group.device] = found.get(group.device, 0) + len(group.ids)
    return found


def codes(made: Plan) -> list[str]:
    return [finding.code for finding in made.findings]


def test_nothing_asked_and_only_a_cpu_is_everything_on_the_cpu() -> None:
    for made in (make_plan(QWEN), make_plan(QWEN, Request(), {"cpu": 64 * GiB})):
        assert {layer.device for layer in made.layers} == {"cpu"}
        assert counts(made) == {"cpu": 48 * 128}
        assert set(made.modules.values()) == {"cpu"}
        assert made.transfers == {} and made.findings == ()


def test_a_model_that_fits_on_one_gpu_changes_nothing() -> None:
    made = plan(OLMOE, "cuda:0=24GiB,cuda:1=24GiB,cpu=64GiB")
    assert counts(made) == {"cuda:0": 16 * 64}
    assert {layer.device for layer in made.layers} == {"cuda:0"}
    assert made.devices["cuda:0"].reserved == 0
    assert codes(made) == ["reserve-not-applied"]


def test_no_reserve_when_it_just_fits_on_one_gpu_unless_given() -> None:
    needed = plan(OLMOE, "cuda:0=24GiB,cpu=64GiB").devices["cuda:0"].used
    exact = {"cuda:0": needed, "cpu": 64 * GiB}
    assert counts(plan(OLMOE, exact)) == {"cuda:0": 16 * 64}
    made = plan(OLMOE, exact, mb_resrv_per_gpu=512)
    assert made.devices["cuda:0"].reserved == 512 * MiB
    assert made.devices["cuda:0"].used <= needed - 512 * MiB
    assert counts(made)["cpu"] == -(-512 * MiB // (12 * MiB))


def test_what_does_not_fit_one_gpu_goes_to_others_then_to_the_cpu() -> None:
    two = plan(QWEN, "cuda:0=32GiB,cuda:1=32GiB,cpu=64GiB")
    assert counts(two).get("cpu", 0) == 0
    assert two.devices["cuda:0"].reserved == 32 * GiB * 2 // 100 + (1 if 32 * GiB * 2 % 100 else 0)
    one = plan(QWEN, "cuda:0=32GiB,cpu=64GiB")
    assert counts(one)["cpu"] > 0
    for made in (two, one):
        assert all(layer.device.startswith("cuda") for layer in made.layers)


def test_experts_go_with_their_layer_on_several_gpus() -> None:
    made = plan(V3, "cuda:0=24GiB,cuda:1=48GiB,cpu=512GiB", format="int4", dense_format="int8")
    assert len(made.transfers) == 1
    for layer in made.layers:
        for group in layer.experts or ():
            assert group.device in (layer.device, "cpu")
            assert group.out_device == layer.device


def test_dense_parts_and_kv_come_before_experts() -> None:
    """As placement.md computes: 24 GiB and V3 in int4 leave room for some 300 experts, no layer on
    the CPU.
    """
    made = plan(V3, "cuda:0=24GiB,cpu=512GiB", format="int4", dense_format="int8", context=8192)
    assert {layer.device for layer in made.layers} == {"cuda:0"}
    assert 250 < counts(made)["cuda:0"] < 330
    assert made.devices["cpu"].read_per_token / GiB == pytest.approx(9.6, abs=0.1)


@pytest.mark.parametrize("memory", ["cuda:0=1GiB,cpu=64GiB", "cuda:0=100MiB,cpu=64GiB"])
def test_a_gpu_too_small_for_all_dense_parts_takes_some_layers(memory: str) -> None:
    made = plan(QWEN, memory)
    devices = [layer.device for layer in made.layers]
    assert devices == sorted(devices, reverse=True)  # GPU layers first, then CPU
    assert "cpu" in devices


def test_reserve_as_number_list_and_map() -> None:
    memory = "cuda:0=24GiB,cuda:1=16GiB,cpu=64GiB"
    for value, expected in (
        (1000, (1000, 1000)), ([1000, 2000], (1000, 2000)), ("1000,2000", (1000, 2000)),
        ({1: 3000}, (0, 3000)), ("0=500,1=700", (500, 700)), ("4096", (4096, 4096)),
    ):  # fmt: skip
        made = plan(QWEN, memory, mb_resrv_per_gpu=value)
        got = tuple(made.devices[f"cuda:{i}"].reserved // MiB for i in (0, 1))
        assert got == expected, value
        for use in made.devices.values():
            assert use.used + use.reserved + use.free == use.capacity
            assert use.free >= 0


@pytest.mark.parametrize("value", ["x", -1, [1, 2, 3], {7: 1}, 1.5, True, "0=1,9=1", {"cpu": 1}])
def test_a_wrong_reserve_is_an_error(value: Any) -> None:
    with pytest.raises(ConfigError, match="mb_resrv_per_gpu"):
        plan(QWEN, "cuda:0=24GiB,cuda:1=16GiB,cpu=64GiB", mb_resrv_per_gpu=value)


def test_a_model_that_fits_nowhere_says_how_much_is_missing_and_what_would_fit() -> None:
    with pytest.raises(PlanError, match=r"cpu needs .* bytes missing.*--format fp8 would fit"):
        plan(V3, "cpu=800GiB")
    with pytest.raises(PlanError, match=r"cpu=\d+GiB would fit") as caught:
        plan(V3, "cpu=10GiB")
    text = str(caught.value)
    needed = text[text.index("cpu=", text.index("missing")) :].split(" ")[0]
    assert plan(V3, needed).num_layers == 61


def test_bytes_missing_are_exact() -> None:
    needed = plan(QWEN, "cpu=64GiB").devices["cpu"].used
    assert plan(QWEN, {"cpu": needed}).devices["cpu"].free == 0
    with pytest.raises(PlanError, match="1 bytes missing"):
        plan(QWEN, {"cpu": needed - 1})


def test_vision_stays_on_the_gpu() -> None:
    scout = ModelSpec.from_family("Llama-4-Scout")
    made = plan(scout, "cuda:0=24GiB,cpu=256GiB")
    assert made.modules["model.visual"] == "cuda:0"


def test_kv_and_workspace_are_counted() -> None:
    small = plan(QWEN, "cuda:0=24GiB,cpu=64GiB", context=4096)
    large = plan(QWEN, "cuda:0=24GiB,cpu=64GiB", context=32768)
    assert small.devices["cuda:0"].kv == 48 * 4096 * 1024 * 2
    assert large.devices["cuda:0"].kv == 8 * small.devices["cuda:0"].kv
    assert counts(large)["cuda:0"] < counts(small)["cuda:0"]
    assert small.devices["cuda:0"].workspace > 0


def test_sliding_windows_limit_the_cache() -> None:
    oss = ModelSpec.from_family("gpt-oss-20b")
    made = plan(oss, "cpu=64GiB", context=8192)
    assert made.devices["cpu"].kv == 12 * (8192 + 128) * 1024 * 2


def test_priority_fills_another_gpu_first() -> None:
    made = plan(OLMOE, "cuda:0=24GiB,cuda:1=24GiB,cpu=64GiB", priority="cuda:1")
    assert {layer.device for layer in made.layers} == {"cuda:1"}


def test_memory_of_the_machine_and_of_the_request() -> None:
    machine = {"cuda:0": 80 * GiB, "cpu": 256 * GiB}
    made = make_plan(QWEN, Request(memory={"cuda:0": "16GiB", "cpu": "64GiB"}), machine)
    assert made.devices["cuda:0"].capacity == 16 * GiB
    with pytest.raises(PlanError, match="cuda:1"):
        make_plan(QWEN, Request(memory={"cuda:1": "16GiB", "cpu": "64GiB"}), machine)


@pytest.mark.parametrize(
    "memory",
    [
        "",
        "cuda:0",
        "cuda:0=",
        "cuda:0=24XB",
        "gpuu=3GiB",
        "cpu=1GiB,cpu=2GiB",
        "cpu=-1",
        {},
        {"x": 1},
    ],
)
def test_wrong_memory_is_an_error(memory: Any) -> None:
    with pytest.raises(ConfigError, match="memory"):
        plan(QWEN, memory)


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("24GiB", 24 * GiB),
        ("24 gib", 24 * GiB),
        ("1.5G", 3 * GiB // 2),
        ("10GB", 10**10),
        ("77", 77),
    ],
)
def test_sizes(text: str, size: int) -> None:
    assert plan(QWEN, {"cpu": "1TiB", "cuda:0": text}).devices["cuda:0"].capacity == size


def test_an_unknown_option_gets_the_nearest() -> None:
    with pytest.raises(ConfigError, match="Did you mean 'memory'"):
        Request.from_dict({"memmory": 1})
