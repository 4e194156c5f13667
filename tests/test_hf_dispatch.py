# SPDX-License-Identifier: Apache-2.0
"""A plan is obeyed or refused: one device and format a layer, on devices that exist."""

import dataclasses

import pytest

from expertyard.dispatch import Placement, check_devices, place_experts
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


def test_each_module_gets_its_layers_device():
    placed = place_experts(plan(None, (group(),), (group("cuda:1"),)), {"a": 1, "b": 2}, FORMATS)
    assert placed == {"a": Placement("cpu", "bf16"), "b": Placement("cuda:1", "bf16")}


@pytest.mark.parametrize("groups", [(group(), group("cuda:0")), (group(), group(format="fp16"))])
def test_a_layer_in_parts_is_refused(groups):
    with pytest.raises(
        PlanError, match=r"Layer 0: the plan parts its experts over .* not supported"
    ):
        place_experts(plan(groups), {"a": 0}, FORMATS)


@pytest.mark.parametrize(("layers", "number"), [([None], 0), ([(group(),)], 1)])
def test_a_plan_for_another_model_is_refused(layers, number):
    with pytest.raises(PlanError, match="The plan was made for another model"):
        place_experts(plan(*layers), {"a": number}, FORMATS)


def test_a_format_without_kernel_is_refused():
    with pytest.raises(PlanError, match=r"format 'int4'.* choose one of bf16, fp16, fp32"):
        place_experts(plan((group(format="int4"),)), {"a": 0}, FORMATS)


@pytest.mark.parametrize(("device", "op"), [("cpu", "torch"), ("cuda:0", "cpu"), ("cpu", "cuda")])
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


def test_another_prefill_op_is_said_not_to_be_used():
    cpu = dataclasses.replace(group(), prefill_op="torch")
    with pytest.warns(UserWarning, match="prefill_op 'torch' is not used"):
        placed = place_experts(plan((cpu,)), {"a": 0}, FORMATS)
    assert placed == {"a": Placement("cpu", "bf16")}
