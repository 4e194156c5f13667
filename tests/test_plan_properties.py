# SPDX-License-Identifier: Apache-2.0
"""Promises of every plan: each expert once, no device over its memory, pins kept, more memory never
slower.
"""

import contextlib
from typing import Any

from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

from expertyard import ModelSpec, Request, make_plan
from expertyard.errors import ExpertyardError, PlanError
from expertyard.memory import GiB, MiB
from expertyard.plan import Plan
from expertyard.spec.known import known_models

SPECS = {name: ModelSpec.from_family(name) for name in known_models()}
names = st.sampled_from(sorted(SPECS))
sizes = st.integers(0, 200 * 1024).map(lambda mib: mib * MiB)
formats = st.sampled_from(["bf16", "int8", "int4", "mxfp4"])


@st.composite
def memories(draw: st.DrawFn) -> dict[str, int]:
    gpus = draw(st.integers(0, 4))
    memory = {f"cuda:{i}": draw(sizes) for i in range(gpus)}
    return {**memory, "cpu": draw(st.sampled_from([4, 64, 256, 4096])) * GiB}


def check(spec: ModelSpec, plan: Plan) -> None:
    """What holds for every plan."""
    assert [layer.layer for layer in plan.layers] == list(range(spec.num_layers))
    for layer, shape in zip(plan.layers, spec.layers, strict=True):
        if shape.experts is None:
            assert layer.experts is None
            continue
        ids = sorted(expert for group in layer.experts or () for expert in group.ids)
        assert ids == list(range(shape.experts.num_experts))
        assert all(group.out_device == layer.device for group in layer.experts or ())
    for use in plan.devices.values():
        assert min(use.weights, use.experts, use.kv, use.workspace, use.read_per_token) >= 0
        if use.capacity:
            assert use.free >= 0 and use.used + use.reserved + use.free == use.capacity
    moved = {
        b.layer: b.device
        for a, b in zip(plan.layers, plan.layers[1:], strict=False)
        if a.device != b.device
    }
    assert plan.transfers == moved
    assert Plan.from_json(plan.to_json()) == plan


@given(names, memories(), formats, st.sampled_from([512, 4096, 65536]))
@settings(max_examples=60, deadline=None)
def test_every_plan_is_whole_and_fits(
    name: str, memory: dict[str, int], format: str, context: int
) -> None:
    spec = SPECS[name]
    with contextlib.suppress(PlanError):
        check(spec, make_plan(spec, Request(memory=memory, format=format, context=context)))


speeds = st.sampled_from([40e9, 200e9, 500e9, 936e9, 1008e9, 3300e9])


@st.composite
def growing(draw: st.DrawFn) -> tuple[str, dict[str, Any], dict[str, int], dict[str, int]]:
    """(model, request, memory, more memory): GPUs of any speed, a profile or none, pins or none."""
    name, memory = draw(names), draw(memories())
    spec, gpus = SPECS[name], len(memory) - 1
    device = draw(st.sampled_from([*memory, f"cuda:{gpus}"]))  # the last one is a new GPU
    request: dict[str, Any] = {"format": draw(formats)}
    if draw(st.booleans()):
        request["bandwidth"] = {f"cuda:{i}": draw(speeds) for i in range(gpus + 1)}
        request["bandwidth"]["cpu"] = draw(st.sampled_from([40e9, 60e9, 400e9]))
    if draw(st.booleans()):
        skew, shift = draw(st.floats(0.1, 3)), draw(st.integers(0, 99))
        request["profile"] = [
            [(1 + (e * 37 + shift * i) % shape.num_experts) ** -skew
             for e in range(shape.num_experts)]
            for i in spec.moe_layers if (shape := spec.layers[i].experts)
        ]  # fmt: skip
        request["strategy"] = draw(st.sampled_from([None, "uniform", "front", "back"]))
    if draw(st.booleans()):
        request["n_cpu_moe"] = draw(st.integers(0, spec.num_layers))
    if draw(st.booleans()):
        request["topology"] = "0-4:\n  isq: Q8_0\n4-9:\n  isq: Q4K\n"
    return name, request, memory, {**memory, device: memory.get(device, 0) + draw(sizes)}


@given(growing())
@settings(max_examples=150, deadline=None)
def test_more_memory_never_gives_a_slower_plan(
    drawn: tuple[str, dict[str, Any], dict[str, int], dict[str, int]],
) -> None:
    name, request, memory, larger = drawn
    spec = SPECS[name]
    try:
        before = make_plan(spec, Request(memory=memory, **request))
    except PlanError:
        return
    after = make_plan(spec, Request(memory=larger, **request))
    check(spec, after)
    assert after.seconds_per_token <= before.seconds_per_token * (1 + 1e-9)


@st.composite
def pinned(draw: st.DrawFn) -> tuple[str, dict[str, int], dict[str, Any]]:
    name = draw(names)
    memory = {**draw(memories()), "cuda:0": 400 * GiB, "cpu": 4096 * GiB}
    spec = SPECS[name]
    request: dict[str, Any] = {}
    if draw(st.booleans()):
        request["layers"] = f"0:{draw(st.integers(0, spec.num_layers))}"
    if draw(st.booleans()):
        request["gpu_experts"] = draw(st.integers(0, 3))
        request["strategy"] = draw(st.sampled_from(["uniform", "front", "back"]))
    elif draw(st.booleans()):
        request["n_cpu_moe"] = draw(st.integers(0, spec.num_layers + 5))
    return name, memory, request


@given(pinned(), formats)
@settings(max_examples=60, deadline=None)
def test_pins_are_kept(drawn: tuple[str, dict[str, int], dict[str, Any]], format: str) -> None:
    name, memory, request = drawn
    spec = SPECS[name]
    try:
        plan = make_plan(spec, Request(memory=memory, format=format, **request))
    except PlanError as error:
        assert "does not fit" in str(error)
        return
    check(spec, plan)
    if "layers" in request:
        number = int(request["layers"][2:])
        expected = ["cuda:0"] * number + ["cpu"] * (spec.num_layers - number)
        assert [layer.device for layer in plan.layers] == expected
    on_gpu = [
        sum(len(g.ids) for g in layer.experts or () if g.device != "cpu") for layer in plan.layers
    ]
    if "gpu_experts" in request:
        assert sum(on_gpu) == request["gpu_experts"] * len(spec.moe_layers)
        if request["strategy"] == "uniform":
            assert {on_gpu[i] for i in spec.moe_layers} == {request["gpu_experts"]}
    if "n_cpu_moe" in request:
        assert not any(on_gpu[: request["n_cpu_moe"]])


text = st.text(st.characters(codec="utf-8"), max_size=40)
anything = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | text,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(text, inner, max_size=4),
    max_leaves=12,
)
grammar = st.text("blk.\\d0-9[](){}|=,;:exps*+?^$ CPUDAcuda:/-\n'\"#&<", max_size=60)
FIELDS = (
    "rules", "layers", "topology", "override_tensor", "device_map", "gpu_experts", "memory",
    "mb_resrv_per_gpu", "n_cpu_moe", "profile", "bandwidth", "priority", "context", "format",
    "strategy", "cpu_moe", "plan",
)  # fmt: skip


@given(st.sampled_from(FIELDS), anything | grammar)
@example("rules", "- match: &a [*a]\n")
@example("rules", "- match:\n    name: '(?P<x'\n")
@example("topology", "0-5: {device: cuda[9999999999999999999]}")
@example("override_tensor", "(" * 5000 + "=CPU")
@example("rules", "[" * 5000)
@example("gpu_experts", "99999999999999999999")
@settings(max_examples=400, deadline=None)
def test_any_value_plans_or_raises_ours(field: str, value: Any) -> None:
    with contextlib.suppress(ExpertyardError):
        check(SPECS["OLMoE-1B-7B"], make_plan(SPECS["OLMoE-1B-7B"], Request(**{field: value})))


@st.composite
def rule_files(draw: st.DrawFn) -> Any:
    """Lists that look like rules, with some of it wrong."""
    names = st.sampled_from(
        ["^model$", r"^model\.layers\.([0-9])\.mlp\.experts$", "experts", "(", ""]
    )
    classes = st.sampled_from(
        ["default", "x.KTransformersExperts", "torch.nn.Linear", "KMoEGate", 3]
    )
    devices = st.sampled_from(["cpu", "cuda", "cuda:1", "npu:0", "gpu?", None, 0])
    kwargs = st.dictionaries(
        st.sampled_from(["generate_device", "out_device", "prefill_device", "typo"]), devices
    )
    moves = st.dictionaries(st.integers(-1, 20) | st.just("3"), devices, max_size=2)
    rule = st.fixed_dictionaries(
        {
            "match": st.dictionaries(st.sampled_from(["name", "class"]), names | classes) | text,
            "replace": st.fixed_dictionaries(
                {"class": classes},
                optional={"kwargs": kwargs | st.fixed_dictionaries({"transfer_map": moves}) | text},
            ),
        },
        optional={"recursive": st.booleans() | text},
    )
    return draw(st.lists(rule | anything, max_size=4))


@given(rule_files())
@settings(max_examples=200, deadline=None)
def test_any_rules_plan_or_raise_ours(rules: Any) -> None:
    assume(rules)
    with contextlib.suppress(ExpertyardError):
        check(SPECS["OLMoE-1B-7B"], make_plan(SPECS["OLMoE-1B-7B"], Request(rules=rules)))
