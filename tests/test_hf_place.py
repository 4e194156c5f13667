# SPDX-License-Identifier: Apache-2.0
"""The dense part of a model goes where the plan says, and its inputs follow."""

import pytest

pytest.importorskip("transformers")

import torch

import expertyard as ey
from expertyard.hf.place import place_dense
from expertyard.hf.state import Promised
from expertyard.plan import LayerPlan, Plan
from hf_families import greedy, load, logits, prompts, save, tiny_model


def two_devices(second):
    layers = tuple(
        LayerPlan(number, device, "bf16", "auto") for number, device in enumerate(("cpu", second))
    )
    modules = {"model.embed_tokens": "cpu", "model.norm": second, "lm_head": second}
    return Plan("m", 2, layers, {1: second}, {}, (), modules)


def test_modules_move_and_inputs_follow():
    """The meta device stands for a GPU: what is sent there computes shapes only."""
    model = tiny_model("mixtral")
    model.set_experts_implementation("batched_mm")  # the only one that runs without values
    promises = tuple(
        Promised(f"model.layers.{i}.mlp.experts", i, None)  # type: ignore[arg-type]
        for i in range(2)
    )
    place_dense(model, two_devices("meta"), promises)
    devices = {name: parameter.device.type for name, parameter in model.named_parameters()}
    for name, device in devices.items():
        there = name.startswith(("model.layers.1.", "model.norm.", "lm_head."))
        assert device == ("meta" if there else "cpu"), name
    out = model(torch.tensor([[1, 2, 3]]), use_cache=False).logits
    assert out.device.type == "meta" and out.shape == (1, 3, model.config.vocab_size)


def test_one_device_needs_no_hooks(tmp_path):
    model = load(save(tiny_model("mixtral"), tmp_path), quantization_config=ey.ExpertsConfig())
    assert not any(module._forward_pre_hooks for module in model.modules())


@pytest.mark.gpu
@pytest.mark.parametrize("layers", ["0:1", "0:2"])
@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss"])
def test_layers_on_a_gpu_agree(family, layers, tmp_path):
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    folder = save(tiny_model(family, torch.bfloat16), tmp_path)
    model = load(folder, torch.bfloat16, quantization_config=ey.ExpertsConfig(layers=layers))
    on_gpu = [row.device for row in ey.verify(model).layers if row.device == "cuda:0"]
    assert on_gpu
    expected = logits(load(folder, torch.float32), prompts())
    got = logits(model, {k: v.to(model.device) for k, v in prompts().items()}).cpu()
    assert (got - expected).abs().median() < 0.02
    greedy(model, {k: v.to(model.device) for k, v in prompts().items()})
