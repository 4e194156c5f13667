# SPDX-License-Identifier: Apache-2.0
"""ORD:NUM means what the device-mapping page says."""

import contextlib
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from expertyard import ModelSpec, Request, make_plan
from expertyard.errors import ExpertyardError, PlanError, RuleError
from expertyard.plan import Plan

MIXTRAL = ModelSpec.from_family("Mixtral-8x7B")  # 32 layers, as the page's Llama-3-8B


def devices(plan: Plan) -> list[str]:
    for layer in plan.layers:
        assert layer.experts is not None
        assert [(len(g.ids), g.device) for g in layer.experts] == [(8, layer.device)]
    return [layer.device for layer in plan.layers]


def plan(value: Any, **more: Any) -> Plan:
    return make_plan(MIXTRAL, Request(layers=value, **more))


@pytest.mark.parametrize(
    "value", ["0:16;1:16", ["0:16", "1:16"], ("0:16", "1:16"), " 0:16 ; 1: 16 "]
)
def test_two_gpus(value: Any) -> None:
    made = plan(value)
    assert devices(made) == ["cuda:0"] * 16 + ["cuda:1"] * 16
    assert made.transfers == {16: "cuda:1"}


@pytest.mark.parametrize("value", [16, "16", ["16"], "0:16", ["0:16"]])
def test_a_bare_number_means_gpu_0_and_the_rest_goes_to_the_cpu(value: Any) -> None:
    assert devices(plan(value)) == ["cuda:0"] * 16 + ["cpu"] * 16


def test_list_order_counts_and_a_single_entry_keeps_its_ordinal() -> None:
    assert devices(plan("1:10;0:10")) == ["cuda:1"] * 10 + ["cuda:0"] * 10 + ["cpu"] * 12
    assert devices(plan("1:16")) == ["cuda:1"] * 16 + ["cpu"] * 16


@pytest.mark.parametrize("gpu", [0, 1])
def test_what_is_outside_the_layers_goes_to_a_gpu_that_has_layers(gpu: int) -> None:
    """Two equal GPUs read it equally fast: sums that differ by rounding do not decide."""
    memory = {"cuda:0": "1TiB", "cuda:1": "1TiB", "cpu": "1TiB"}
    for number in range(1, 32):
        made = plan(f"{gpu}:{number}", memory=memory)
        assert set(made.modules.values()) == {f"cuda:{gpu}"}, number


@pytest.mark.parametrize("value", [0, "0", "0:0", "0:0;1:0"])
def test_no_layers_is_all_on_the_cpu(value: Any) -> None:
    assert devices(plan(value)) == ["cpu"] * 32


@pytest.mark.parametrize("value", [500, "500", "0:500", ["500"]])
def test_one_entry_above_the_model_is_clamped_and_said(value: Any) -> None:
    made = plan(value)
    assert devices(made) == ["cuda:0"] * 32
    assert [finding.code for finding in made.findings] == ["clamped"]


def test_several_entries_above_the_model_are_an_error_with_both_numbers() -> None:
    with pytest.raises(RuleError, match=r"sum to 40 layers.*has 32"):
        plan("0:20;1:20")


@pytest.mark.parametrize(
    ("value", "quoted"),
    [
        ("", "nothing"), ("0:16;1", "'1'"), ("0:16;0:16", "named twice"), ("0:-1", "'-1'"),
        ("0:1.5", "'1.5'"), ("a:3", "'a'"), ("0:1:2", "'0:1:2'"), ("x", "'x'"), ("0:16,1:16",
        "'16,1:16'|0:16"),
        (-3, "'-3'"), (True, "True"), (1.5, "1.5"), ({"0": 16}, "0"), ("99999:1", "GPU 99999"),
    ],
)  # fmt: skip
def test_wrong_text_is_quoted(value: Any, quoted: str) -> None:
    with pytest.raises(RuleError, match=quoted):
        plan(value)


def test_a_gpu_that_is_not_there_is_named() -> None:
    with pytest.raises(PlanError, match="cuda:3"):
        plan("3:2", memory={"cuda:0": "100GiB", "cpu": "100GiB"})


@given(st.one_of(st.text(max_size=20), st.lists(st.text(max_size=6)), st.integers(), st.none()))
def test_any_value_plans_or_raises_ours(value: Any) -> None:
    with contextlib.suppress(ExpertyardError):
        assert len(plan(value).layers) == 32
