# SPDX-License-Identifier: Apache-2.0
"""A plan comes down to parts of each layer on devices that exist, or is refused."""

import dataclasses

import pytest

from expertyard.dispatch import PartPlan, Placement, Prefill, check_devices, place_experts
from expertyard.errors import DeviceError, PlanError
from expertyard.plan import ExpertGroup, LayerPlan, Plan

FORMATS = ("bf16", "fp16", "fp32")


def group(device="cpu", format="bf16", op=None, ids=(0, 1)):
    op = op or device.partition(":")[0]
    return ExpertGroup(ids, device, format, op, op, device, "auto")


def plan(*layers):
    """Each layer: its experts' groups, or None for a dense one."""
    return Plan(
        model="m",
        num_layers=len(layers),
        layers=tuple(LayerPlan(i, "cpu", "bf16", "auto", g) for i, g in enumerate(layers)),
        transfers={},
        devices={},
    )


def part(device="cpu", format="bf16", ids=(0, 1), prefill=None, op=None):
    return PartPlan(ids, device, format, op or device.partition(":")[0], "auto", prefill)


def test_each_module_gets_its_layers_parts():
    placed = place_experts(plan(None, (group(),), (group("cuda:1"),)), {"a": 1, "b": 2}, FORMATS)
    assert placed == {"a": Placement("cpu", (part(),)), "b": Placement("cpu", (part("cuda:1"),))}


def test_a_layer_may_be_in_parts_and_groups_of_one_fate_come_together():
    groups = (
        group(ids=(0,)),
        group("cuda:0", ids=(2, 3)),
        dataclasses.replace(group(ids=(1,)), why="a rule"),
    )
    (placed,) = place_experts(plan(groups), {"a": 0}, FORMATS).values()
    assert placed.parts == (
        dataclasses.replace(part(ids=(0, 1)), why="auto, a rule"),
        part("cuda:0", ids=(2, 3)),
    )


@pytest.mark.parametrize(("layers", "number"), [([None], 0), ([(group(),)], 1)])
def test_a_plan_for_another_model_is_refused(layers, number):
    with pytest.raises(PlanError, match="The plan was made for another model"):
        place_experts(plan(*layers), {"a": number}, FORMATS)


def test_a_format_without_kernel_is_refused():
    with pytest.raises(PlanError, match=r"format 'int4'.* choose one of bf16, fp16, fp32"):
        place_experts(plan((group(format="int4"),)), {"a": 0}, FORMATS)


@pytest.mark.parametrize(("device", "op"), [("cpu", "xpu"), ("cuda:0", "cpu"), ("cpu", "cuda")])
def test_an_op_that_does_not_run_there_is_refused(device, op):
    with pytest.raises(PlanError, match=f"with op '{op}' on {device}"):
        place_experts(plan((group(device, op=op),)), {"a": 0}, FORMATS)


def test_a_device_that_is_not_there_is_named():
    with pytest.raises(DeviceError, match="the experts of layer 1 on cuda:3, which is not on this"):
        check_devices(plan((group(),), (group("cuda:3"),)), ["cpu", "cuda:0"])


def test_a_device_that_cannot_be_used_says_why():
    with pytest.raises(DeviceError, match=r"cuda:0, which cannot be used \(driver too old\)"):
        check_devices(plan((group("cuda:0"),)), ["cpu"], {"cuda:0": "driver too old"})


def test_what_is_there_is_accepted():
    check_devices(plan((group(),), None, (group("cuda:0"),)), ["cpu", "cuda:0"])


@pytest.mark.parametrize(
    ("device", "op", "prefill"),
    [
        ("cuda:1", "cuda", Prefill("cuda:1", "cuda", "auto")),
        ("cpu", "torch", Prefill("cpu", "torch", "auto")),
        ("cpu", "cpu", None),
    ],
)
def test_another_prefill_is_part_of_the_placement(device, op, prefill):
    """The layer's own GPU computes where the rule names an op only."""
    wanted = plan((dataclasses.replace(group(), prefill_op=op),))
    wanted = dataclasses.replace(
        wanted, layers=(dataclasses.replace(wanted.layers[0], device=device),)
    )
    (placed,) = place_experts(wanted, {"a": 0}, FORMATS).values()
    assert placed.parts[0].prefill == prefill


def test_a_prefill_on_no_gpu_is_refused():
    wanted = plan((dataclasses.replace(group(), prefill_op="cuda"),))
    with pytest.raises(PlanError, match="prefill with op 'cuda' on cpu"):
        place_experts(wanted, {"a": 0}, FORMATS)


def test_plain_torch_multiplies_plain_numbers_only():
    with pytest.raises(PlanError, match="op 'torch' is plain PyTorch"):
        place_experts(plan((group(op="torch", format="int4"),)), {"a": 0})
