# SPDX-License-Identifier: Apache-2.0
"""attach() and detach(): there and back, bit for bit, and nothing half done."""

import copy

import pytest

pytest.importorskip("transformers")

import torch

import expertyard as ey
from expertyard.errors import ConfigError, KernelError
from expertyard.hf import attachment
from hf_families import load, logits, prompts, save, tiny_model


def snapshot(model):
    """Everything that must come back: objects, classes, instance attributes, strides, bits."""
    modules = {
        name: (id(module), type(module), sorted(module.__dict__))
        for name, module in model.named_modules()
    }
    tensors = {
        name: (id(tensor), tensor.stride(), tensor.detach().clone())
        for name, tensor in model.named_parameters()
    }
    return modules, tensors


def assert_same(before, after):
    assert before[0] == after[0]
    assert before[1].keys() == after[1].keys()
    for name, (identity, stride, value) in before[1].items():
        assert after[1][name][:2] == (identity, stride), name
        assert torch.equal(after[1][name][2], value), name


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss"])
def test_detach_gives_back_the_model_bit_for_bit(family):
    model = tiny_model(family)
    model.set_experts_implementation("eager")
    expected, before = logits(model, prompts()), snapshot(model)
    assert ey.attach(model) is model
    assert snapshot(model)[0].keys() == before[0].keys()
    attached = logits(model, prompts())
    torch.testing.assert_close(attached, expected, rtol=1e-5, atol=1e-5)
    assert ey.detach(model) is model
    assert_same(before, snapshot(model))
    assert torch.equal(logits(model, prompts()), expected)


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss"])
def test_parameters_and_state_dict_stay_while_attached(family, tmp_path):
    model = tiny_model(family)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    ey.attach(model)
    after = model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(after[name], value) for name, value in before.items())
    again = load(save(model, tmp_path), experts_implementation="eager")
    model.set_experts_implementation("eager")
    expected = logits(ey.detach(model), prompts())
    torch.testing.assert_close(logits(again, prompts()), expected)


def test_weights_are_used_where_they_lie():
    model = ey.attach(tiny_model("mixtral", torch.bfloat16))
    experts = model.model.layers[0].mlp.experts
    expected = logits(model, prompts())
    experts.down_proj.data.zero_()  # seen by the kernel without attaching again
    assert not torch.equal(logits(model, prompts()), expected)


def test_new_parameters_are_found():
    """What .to(), load_state_dict(assign=True) or accelerate's offload do: new memory."""
    model = ey.attach(tiny_model("gpt_oss"))
    other = tiny_model("gpt_oss", seed=5)
    other.set_experts_implementation("eager")
    expected = logits(other, prompts())
    model.load_state_dict(other.state_dict(), assign=True)
    torch.testing.assert_close(logits(model, prompts()), expected, rtol=1e-5, atol=1e-5)
    model.to(torch.bfloat16)
    other.to(torch.bfloat16)
    close = logits(model, prompts()) - logits(other, prompts())
    assert close.abs().median() < 0.02
    assert ey.verify(model).layers[0].format == "bf16"


def test_a_changed_bias_is_found():
    """Biases are kept in float32, so that a change in place must be noticed."""
    model = ey.attach(tiny_model("gpt_oss", torch.bfloat16))
    expected = logits(model, prompts())
    with torch.no_grad():
        model.model.layers[1].mlp.experts.down_proj_bias.add_(1)
    assert not torch.equal(logits(model, prompts()), expected)


def test_a_failure_half_way_leaves_the_model_as_it_was(monkeypatch):
    model = tiny_model("gpt_oss")
    before = snapshot(model)
    real, calls = attachment.bind, []

    def second_fails(*args):
        calls.append(args)
        if len(calls) == 2:
            raise KernelError("the second layer fails")
        return real(*args)

    monkeypatch.setattr(attachment, "bind", second_fails)
    with pytest.raises(KernelError, match="the second layer fails"):
        ey.attach(model)
    assert len(calls) == 2
    assert_same(before, snapshot(model))
    with pytest.raises(ConfigError, match="not attached"):
        ey.detach(model)


def test_attach_twice_and_detach_of_a_stranger_are_sentences():
    model = tiny_model("olmoe")
    with pytest.raises(ConfigError, match=r"not attached with expertyard\.attach"):
        ey.detach(model)
    ey.attach(model)
    with pytest.raises(ConfigError, match=r"Call expertyard\.detach\(model\) first"):
        ey.attach(model)


def test_a_copy_of_an_attached_model_is_its_own():
    model = ey.attach(tiny_model("qwen3_moe"))
    expected = logits(model, prompts())
    twin = copy.deepcopy(model)
    for parameter in model.parameters():
        parameter.data.zero_()
    assert torch.equal(logits(twin, prompts()), expected)
    ey.verify(twin)
    ey.detach(twin)


def test_attach_obeys_a_plan_and_its_format():
    model = tiny_model("mixtral")
    ey.attach(model, ey.ExpertsConfig(format="bf16", memory={"cpu": "1GiB"}))
    report = ey.verify(model)
    assert {(row.device, row.format) for row in report.layers} == {("cpu", "bf16")}


def test_a_dense_model_is_refused_with_a_sentence():
    from transformers import LlamaConfig, LlamaForCausalLM

    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=9,
            hidden_size=16,
            intermediate_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
        )
    )
    with pytest.raises(KernelError, match="LlamaForCausalLM: no module uses transformers' experts"):
        ey.attach(model)


def test_backward_is_a_sentence():
    model = ey.attach(tiny_model("mixtral"))
    loss = model(**prompts()).logits.sum()
    with pytest.raises(KernelError, match="has no gradient"):
        loss.backward()


def test_pickling_while_attached_is_a_sentence(tmp_path):
    model = ey.attach(tiny_model("mixtral"))
    with pytest.raises(ConfigError, match=r"Call expertyard\.detach\(model\) first"):
        torch.save(model, tmp_path / "model.pt")
    torch.save(ey.detach(model), tmp_path / "model.pt")
