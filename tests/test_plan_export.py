# SPDX-License-Identifier: Apache-2.0
"""A plan exported to another grammar and read back places everything where it was."""

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from expertyard import ModelSpec, Request, make_plan
from expertyard.errors import PlanError, RuleError
from expertyard.plan import Plan
from expertyard.plan.export import _runs, export

SPECS = {
    name: ModelSpec.from_family(name)
    for name in ("Mixtral-8x7B", "OLMoE", "DeepSeek-V2-Lite", "gpt-oss-20b", "Llama-4-Maverick")
}
devices = st.sampled_from(["cuda:0", "cuda:1", "cuda:2", "cpu"])


def places(plan: Plan) -> list[Any]:
    return [
        (layer.device, sorted((e, g.device) for g in layer.experts or () for e in g.ids))
        for layer in plan.layers
    ] + [dict(plan.modules)]


def read_back(spec: ModelSpec, kind: str, text: str) -> Plan:
    field = {"kt": "rules", "ord": "layers", "ot": "override_tensor", "device_map": "device_map"}[
        kind
    ]
    return make_plan(spec, Request(**{field: json.loads(text) if kind == "device_map" else text}))


@st.composite
def device_maps(draw: st.DrawFn, single_experts: bool) -> tuple[ModelSpec, dict[str, str]]:
    """A placement of everything, drawn as a device map."""
    spec = SPECS[draw(st.sampled_from(sorted(SPECS)))]
    table = {m.name: draw(devices) for m in spec.tree if m.layer is None and m.shapes}
    for module in spec.tree:
        if module.part == "layer" or (module.part == "experts" and draw(st.booleans())):
            table[module.name] = draw(devices)
        if module.part == "experts" and single_experts and draw(st.integers(0, 5)) == 0:
            for expert in draw(st.sets(st.integers(0, 7), max_size=3)):
                table[f"{module.name}.{expert}"] = draw(devices)
    return spec, table


@pytest.mark.parametrize("kind", ["kt", "device_map"])
@given(device_maps(single_experts=True))
@settings(max_examples=20, deadline=None)
def test_anything_round_trips(kind: str, drawn: tuple[ModelSpec, dict[str, str]]) -> None:
    spec, table = drawn
    plan = make_plan(spec, Request(device_map=table))
    again = read_back(spec, kind, export(plan, spec, kind))
    assert places(again) == places(plan)
    assert again.transfers == plan.transfers


@given(device_maps(single_experts=False))
@settings(max_examples=20, deadline=None)
def test_whole_layers_of_experts_round_trip_through_ot(
    drawn: tuple[ModelSpec, dict[str, str]],
) -> None:
    spec, table = drawn
    for module in spec.tree:  # llama.cpp has no vision tower in the model's file
        if module.part == "vision":
            table[module.name] = "cuda:0"
    plan = make_plan(spec, Request(device_map=table))
    again = read_back(spec, "ot", export(plan, spec, "ot"))
    assert places(again)[:-1] == places(plan)[:-1]


@given(st.lists(st.integers(0, 10), min_size=1, max_size=3), st.permutations([0, 1, 2]))
@settings(max_examples=30, deadline=None)
def test_ord_round_trips(numbers: list[int], order: list[int]) -> None:
    spec = SPECS["Mixtral-8x7B"]
    text = ";".join(f"{ordinal}:{n}" for ordinal, n in zip(order, numbers, strict=False))
    plan = make_plan(spec, Request(layers=text))
    again = read_back(spec, "ord", export(plan, spec, "ord"))
    assert places(again)[:-1] == places(plan)[:-1]


def test_formats_and_operators_survive_kt() -> None:
    spec = SPECS["OLMoE"]
    plan = make_plan(spec, Request(memory="cuda:0=4GiB,cpu=64GiB", format="int4"))
    again = read_back(spec, "kt", export(plan, spec, "kt"))
    assert [
        layer.experts and [(g.ids, g.format, g.op) for g in layer.experts] for layer in again.layers
    ] == [
        layer.experts and [(g.ids, g.format, g.op) for g in layer.experts] for layer in plan.layers
    ]


def test_what_a_grammar_cannot_say_is_an_error_that_names_the_layer() -> None:
    spec = SPECS["OLMoE"]
    split = make_plan(spec, Request(gpu_experts=8))
    for kind in ("ot", "ord"):
        with pytest.raises(PlanError, match="layer 0"):
            export(split, spec, kind)
    with pytest.raises(PlanError, match="expected one of kt"):
        export(split, spec, "yaml")


@given(st.sets(st.integers(0, 400), min_size=1))
def test_number_patterns_match_exactly_their_numbers(numbers: set[int]) -> None:
    import re

    pattern = re.compile(_runs(numbers))
    assert {n for n in range(500) if pattern.fullmatch(str(n))} == numbers


@given(device_maps(single_experts=True))
@settings(max_examples=20, deadline=None)
def test_a_saved_plan_is_an_input(drawn: tuple[ModelSpec, dict[str, str]]) -> None:
    spec, table = drawn
    plan = make_plan(spec, Request(device_map=table, format="int4"))
    again = make_plan(spec, Request(plan=plan.to_json()))
    assert again.layers == plan.layers and again.modules == plan.modules


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"schema": 2}, "schema"),
        ({"layers": []}, "0 layers"),
        ({"modules": 3}, "modules"),
        ({"modules": {"lm_head": "x"}}, "lm_head"),
    ],
)
def test_a_saved_plan_that_does_not_suit_is_explained(change: dict[str, Any], said: str) -> None:
    data = make_plan(SPECS["OLMoE"], Request()).to_json()
    with pytest.raises(RuleError, match=said):
        make_plan(SPECS["OLMoE"], Request(plan={**data, **change}))
    with pytest.raises(RuleError, match="16 layers"):
        make_plan(SPECS["Mixtral-8x7B"], Request(plan=data))


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("ids", "0-62", "each of 64 experts once"),
        ("format", "int5", "int5"),
        ("op", "tpu", "tpu"),
        ("device", None, "device"),
        ("ids", "x", "ids"),
    ],
)
def test_a_saved_group_that_is_wrong_is_explained(key: str, value: Any, said: str) -> None:
    data = make_plan(SPECS["OLMoE"], Request()).to_json()
    data["layers"][3]["experts"][0][key] = value
    with pytest.raises(RuleError, match=f"layer 3.*{said}"):
        make_plan(SPECS["OLMoE"], Request(plan=data))
