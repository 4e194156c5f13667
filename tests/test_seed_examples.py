# SPDX-License-Identifier: Apache-2.0
"""The examples of the two pages that device placement is known by, word for word, on models as deep
as theirs, on virtual GPUs: the single-device run's logits and greedy tokens.

KTransformers, multi-GPU tutorial: 60 layers over two GPUs by rules, and layers 4-8's experts to the
first GPU by a rule before the others. mistral.rs, device mapping: "0:16;1:16", 16, automatic with a
reserve.
"""

from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("transformers")

import torch
from transformers import AutoModelForCausalLM

import expertyard as ey
from expertyard import virtual
from hf_families import tiny_model

TWO_GPUS = r"""
- match:
    name: "^model$"
  replace:
    class: "ktransformers.operators.models.KDeepseekV2Model"
    kwargs:
      transfer_map:
        30: "cuda:1"
EXTRA
# allcate 0-29 layers‘s out_device to cuda:0
- match:
    name: "^model\\.layers\\.(0|[1-9]|[12][0-9])\\.mlp\\.experts$"
  replace:
    class: ktransformers.operators.experts.KTransformersExperts     # custom MoE Kernel
    kwargs:
      generate_device: "cpu"
      generate_op:  "KExpertsCPU"
      out_device: "cuda:0"
  recursive: False # don't recursively inject submodules of this module

# allocate 30-59 layers‘s out_device to cuda:1
- match:
    name: "^model\\.layers\\.([345][0-9])\\.mlp\\.experts$"
  replace:
    class: ktransformers.operators.experts.KTransformersExperts     # custom MoE Kernel
    kwargs:
      generate_device: "cpu"
      generate_op:  "KExpertsCPU"
      out_device: "cuda:1"
  recursive: False # don't recursively inject submodules of this module

# "For other modules, we can set the device in the same way."
- match:
    name: "^model\\.layers\\.(0|[1-9]|[12][0-9])\\."
  replace:
    class: "default"
    kwargs: {generate_device: "cuda:0", prefill_device: "cuda:0"}
- match:
    name: "^model\\.layers\\.([345][0-9])\\.|^model\\.norm|^lm_head"
  replace:
    class: "default"
    kwargs: {generate_device: "cuda:1", prefill_device: "cuda:1"}
"""
LAYERS_4_TO_8 = r"""
# Add new rule before old rule.
- match:
    name: "^model\\.layers\\.([4-8])\\.mlp\\.experts$" # experts in layer 4~8 as marlin expert
  replace:
    class: ktransformers.operators.experts.KTransformersExperts
    kwargs:
      generate_device: "cuda:0"
      generate_op:  "KExpertsMarlin"
  recursive: False
"""

# depth, the request, layer -> (where it is, where its experts are), for a few layers
EXAMPLES: dict[str, tuple[int, dict[str, Any], dict[int, tuple[str, set[str]]]]] = {
    "two GPUs": (
        60, {"rules": TWO_GPUS.replace("EXTRA", "")},
        {4: ("cuda:0", {"cpu"}), 29: ("cuda:0", {"cpu"}), 30: ("cuda:1", {"cpu"})},
    ),
    "layers 4-8": (
        60, {"rules": TWO_GPUS.replace("EXTRA", LAYERS_4_TO_8)},
        {3: ("cuda:0", {"cpu"}), 4: ("cuda:0", {"cuda:0"}), 8: ("cuda:0", {"cuda:0"}),
         9: ("cuda:0", {"cpu"}), 59: ("cuda:1", {"cpu"})},
    ),
    "0:16;1:16": (
        32, {"layers": "0:16;1:16"},
        {15: ("cuda:0", {"cuda:0"}), 16: ("cuda:1", {"cuda:1"}), 31: ("cuda:1", {"cuda:1"})},
    ),
    '["0:16", "1:16"]': (
        32, {"layers": ["0:16", "1:16"]},
        {15: ("cuda:0", {"cuda:0"}), 16: ("cuda:1", {"cuda:1"})},
    ),
    "16": (
        32, {"layers": 16},
        {15: ("cuda:0", {"cuda:0"}), 16: ("cpu", {"cpu"}), 31: ("cpu", {"cpu"})},
    ),
    "automatic with a reserve": (
        32,
        {"memory": {"cuda:0": "8MiB", "cuda:1": "8MiB", "cpu": "1GiB"}, "mb_resrv_per_gpu": [5, 5],
         "context": 64},
        {},
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    made = {}
    for depth in (60, 32):
        made[depth] = tmp_path_factory.mktemp(f"layers{depth}")
        tiny_model("deepseek_v3", num_hidden_layers=depth).save_pretrained(made[depth])
    return made


def results(model: Any) -> tuple[torch.Tensor, torch.Tensor]:
    ids = torch.arange(1, 12)[None]
    with torch.no_grad():
        tokens: torch.Tensor = model.generate(ids, max_new_tokens=12, do_sample=False)
        return model(ids).logits, tokens


@pytest.fixture(scope="module")
def expected(folders: dict[int, Path]) -> dict[int, tuple[torch.Tensor, torch.Tensor]]:
    return {
        depth: results(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval())
        for depth, folder in folders.items()
    }


@pytest.mark.parametrize("example", EXAMPLES)
def test_an_example_runs_as_it_is_written(
    example: str, folders: dict[int, Path], expected: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(virtual.COUNT, "2")
    depth, request, places = EXAMPLES[example]
    model = AutoModelForCausalLM.from_pretrained(
        folders[depth], dtype=torch.float32, quantization_config=ey.ExpertsConfig(**request)
    ).eval()
    plan = model.__dict__["_expertyard"].plan
    for number, (device, of_experts) in places.items():
        layer = plan.layers[number]
        assert layer.device == device
        assert {group.device for group in layer.experts} == of_experts
    report = ey.verify(model)
    devices = {group.device for layer in plan.layers for group in layer.experts or ()}
    assert {row.device for row in report.layers} == devices
    if not places:
        assert {layer.device for layer in plan.layers} | devices == {"cpu", "cuda:0", "cuda:1"}
    with virtual.Guard(plan.layers[0].device):
        logits, tokens = results(model)
    torch.testing.assert_close(logits, expected[depth][0], rtol=1e-4, atol=1e-4)
    assert torch.equal(tokens, expected[depth][1])
