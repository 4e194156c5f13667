# SPDX-License-Identifier: Apache-2.0
"""verify() catches every way off our kernels, and names the layer."""

import copy

import pytest

pytest.importorskip("transformers")

import torch

import expertyard as ey
from expertyard.errors import VerifyError
from hf_families import load, logits, prompts, save, tiny_model


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save(tiny_model("qwen3_moe", mlp_only_layers=[]), tmp_path_factory.mktemp("qwen3"))


@pytest.fixture
def loaded(folder):
    return load(folder, quantization_config=ey.ExpertsConfig())


def test_the_report_says_what_ran(loaded):
    report = ey.verify(loaded)
    assert [row.layer for row in report.layers] == [0, 1]
    for row in report.layers:
        packed = loaded.get_submodule(row.name).experts.parts[0].packed
        assert row.kernel == packed.last_kernel and packed.calls == 1
        assert (row.device, row.format, row.num_experts) == ("cpu", "fp32", 8)
        assert row.nbytes == 8 * 3 * 72 * 40 * 4
        assert row.kernel in str(report) and row.name in str(report)


def test_a_module_put_back_to_eager_is_caught(loaded, folder):
    eager = load(folder, experts_implementation="eager")
    loaded.model.layers[1].mlp.experts = eager.model.layers[1].mlp.experts
    logits(loaded, prompts())  # runs, and nothing else would tell
    expected = r"layers\.1\.mlp\.experts: it was replaced by Qwen3MoeExperts"
    with pytest.raises(VerifyError, match=expected):
        ey.verify(loaded)


def test_another_layers_experts_are_caught(loaded):
    """A module of ours in the wrong place would pass a check of types."""
    loaded.model.layers[1].mlp = torch.nn.Identity()
    with pytest.raises(VerifyError, match=r"layers\.1\.mlp\.experts: the plan has it, the model"):
        ey.verify(loaded)


def test_experts_that_the_plan_does_not_have_are_caught(loaded):
    loaded.model.layers.append(copy.deepcopy(loaded.model.layers[0]))
    with pytest.raises(VerifyError, match=r"layers\.2\.mlp\.experts: the plan does not have this"):
        ey.verify(loaded)


def test_a_changed_implementation_is_caught(folder):
    model = load(folder, experts_implementation="expertyard")
    ey.verify(model)
    model.set_experts_implementation("grouped_mm")
    with pytest.raises(VerifyError, match=r'2 of 2 .*\n.*it runs transformers\' "grouped_mm"'):
        ey.verify(model)


def test_an_uncovered_forward_is_caught(folder):
    model = ey.attach(load(folder, experts_implementation="eager"))
    ey.verify(model)
    del model.model.layers[0].mlp.experts.__dict__["forward"]
    with pytest.raises(VerifyError, match=r"1 of 2 .*\n.*layers.0.*its forward was replaced"):
        ey.verify(model)


def test_a_wrapped_forward_that_skips_the_kernel_is_caught(loaded):
    experts = loaded.model.layers[0].mlp.experts
    experts.forward = lambda hidden_states, *routing: torch.zeros_like(hidden_states)
    with pytest.raises(VerifyError, match="expected one call of a kernel of ours, counted 0"):
        ey.verify(loaded)


def test_moved_weights_are_caught(folder):
    model = ey.attach(load(folder), ey.ExpertsConfig())
    model.model.layers[0].mlp.experts.to("meta")
    with pytest.raises(VerifyError, match="its weights were moved from cpu to meta after attach"):
        ey.verify(model)


def test_experts_elsewhere_than_planned_are_caught(loaded):
    """As if something had packed them anew: in another format than the plan's."""
    experts = loaded.model.layers[0].mlp.experts
    half = tiny_model("qwen3_moe", torch.bfloat16, mlp_only_layers=[])
    experts.experts.parts[0].packed = _packed_of(half.model.layers[0].mlp.experts)
    experts.experts._arrange()
    with pytest.raises(VerifyError, match="the plan says fp32, its experts are bf16"):
        ey.verify(loaded)


def _packed_of(module):
    return ey.PackedExperts.from_tensors(module.gate_up_proj, module.down_proj)


def test_a_compiled_model_can_be_verified(folder):
    model = torch.compile(load(folder, experts_implementation="expertyard"), backend="eager")
    assert len(ey.verify(model).layers) == 2


def test_a_model_without_experts_is_a_sentence():
    with pytest.raises(VerifyError, match="Linear has no experts layer"):
        ey.verify(torch.nn.Linear(2, 2))
