# SPDX-License-Identifier: Apache-2.0
"""accelerate's hooks: weights that come to a new address at every call, and weights on disk."""

import pytest

pytest.importorskip("transformers")
pytest.importorskip("accelerate")

import expertyard as ey
from expertyard.errors import KernelError
from hf_families import greedy, load, logits, prompts, save, tiny_model

ON_DISK = {
    "model.embed_tokens": "cpu",
    "model.rotary_emb": "cpu",
    "model.layers.0": "cpu",
    "model.layers.1": "disk",
    "model.norm": "cpu",
    "lm_head": "cpu",
}


@pytest.fixture(scope="module", params=["qwen3_moe", "gpt_oss"])
def folder(request, tmp_path_factory):
    return save(tiny_model(request.param), tmp_path_factory.mktemp(request.param))


def test_offloaded_parameters_are_never_stale(folder, tmp_path):
    """After every layer accelerate frees what it has read: an old pointer would point nowhere."""
    expected = greedy(load(folder, experts_implementation="eager"), prompts())
    options = {"device_map": ON_DISK, "offload_folder": tmp_path}
    model = load(folder, experts_implementation="expertyard", **options)
    assert next(model.model.layers[1].mlp.experts.parameters()).device.type == "meta"
    assert (greedy(model, prompts()) == expected).all()


def test_attach_to_offloaded_experts_is_a_sentence(folder, tmp_path):
    model = load(folder, device_map=ON_DISK, offload_folder=tmp_path)
    with pytest.raises(KernelError, match=r"no storage \(device meta\).*ExpertsConfig"):
        ey.attach(model)


def test_hooks_that_leave_weights_in_place_keep_working(folder):
    from accelerate.hooks import ModelHook, add_hook_to_module

    class Count(ModelHook):
        calls = 0

        def pre_forward(self, module, *args, **kwargs):
            self.calls += 1
            return args, kwargs

    model = load(folder, experts_implementation="eager")
    expected, hook = logits(model, prompts()), Count()
    name = next(n for n, _ in model.named_modules() if n.endswith("1.mlp.experts"))
    add_hook_to_module(model.get_submodule(name), hook)
    ey.verify(ey.attach(model))
    before = hook.calls
    got = logits(model, prompts())
    assert (got - expected).abs().max() < 1e-5
    assert hook.calls == before + 1
    ey.detach(model)
    assert (logits(model, prompts()) == expected).all()
    assert hook.calls == before + 2
