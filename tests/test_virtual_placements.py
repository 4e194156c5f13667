# SPDX-License-Identifier: Apache-2.0
"""Every grammar's placement runs on virtual GPUs: the single-device run's logits, the same greedy
tokens, and no tensor of one device meets one of another.
"""

from typing import Any

import pytest

pytest.importorskip("transformers")

import torch
from transformers import AutoModelForCausalLM

import expertyard as ey
from expertyard import virtual
from expertyard.models import tiny_moe

SEED = r"""
- match:
    name: "^model$"
  replace:
    class: "ktransformers.operators.models.KDeepseekV2Model"
    kwargs:
      transfer_map:
        2: "cuda:1"
- match:
    name: "^model\\.embed_tokens"
  replace:
    class: "default"
    kwargs:
      generate_device: "cpu"
      prefill_device: "cpu"
EXTRA
- match:
    name: "^model\\.layers\\.([01])\\.mlp\\.experts$"
  replace:
    class: ktransformers.operators.experts.KTransformersExperts
    kwargs:
      generate_device: "cpu"
      generate_op:  "KExpertsCPU"
      out_device: "cuda:0"
  recursive: False
- match:
    name: "^model\\.layers\\.([23])\\.mlp\\.experts$"
  replace:
    class: ktransformers.operators.experts.KTransformersExperts
    kwargs:
      generate_device: "cpu"
      generate_op:  "KExpertsCPU"
      out_device: "cuda:1"
  recursive: False
- match:
    name: "^model\\.layers\\.([01])\\."
  replace:
    class: "default"
    kwargs:
      generate_device: "cuda:0"
      prefill_device: "cuda:0"
- match:
    name: "^model\\.layers\\.([23])\\.|^model\\.norm|^lm_head"
  replace:
    class: "default"
    kwargs:
      generate_device: "cuda:1"
      prefill_device: "cuda:1"
"""
# the page's second step: experts of some layers to the GPU, by a rule before the old ones
MORE = r"""
- match:
    name: "^model\\.layers\\.([1-2])\\.mlp\\.experts$"
  replace:
    class: ktransformers.operators.experts.KTransformersExperts
    kwargs:
      generate_device: "cuda:0"
      generate_op:  "KExpertsMarlin"
  recursive: False
"""
REQUESTS: dict[str, dict[str, Any]] = {
    "two GPUs by rules": {"rules": SEED.replace("EXTRA", "")},
    "experts of layers 1-2 on cuda:0": {"rules": SEED.replace("EXTRA", MORE)},
    "0:2;1:2": {"layers": "0:2;1:2"},
    "0:1;1:1, the rest on the CPU": {"layers": ["0:1", "1:1"]},
    "automatic, all on one": {"memory": {"cuda:0": "1GiB", "cuda:1": "1GiB", "cpu": "1GiB"}},
    "automatic with a reserve": {
        "memory": {"cuda:0": "60MiB", "cuda:1": "60MiB", "cpu": "1GiB"},
        "mb_resrv_per_gpu": [46, 46],
        "context": 256,
    },
    "half of each layer's experts": {"layers": "0:2;1:2", "gpu_experts": 8},
    "single experts": {"layers": "1:4", "gpu_experts": "0-2,9"},
    "-ot": {"override_tensor": r"blk\.[01]\.ffn_.*_exps=CUDA1,exps=CPU"},
    "topology": {"topology": "0-2:\n  device: cuda[0]\n2-4:\n  device: cuda[1]\n"},
    "device_map": {
        "device_map": {"model.embed_tokens": "cpu", "model.layers.0": 0, "model.layers.1": 1,
                       "model.layers.2": "cpu", "model.layers.3": 1, "model.norm": 0,
                       "model.rotary_emb": 0, "lm_head": 0},
    },
}  # fmt: skip


@pytest.fixture(autouse=True)
def two_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(virtual.COUNT, "2")


def load(dtype: torch.dtype, **options: Any) -> Any:
    return AutoModelForCausalLM.from_pretrained(tiny_moe(), dtype=dtype, **options).eval()


def ids() -> torch.Tensor:
    return torch.tensor([[256, *b"The function returns a list"]])


@pytest.fixture(scope="module")
def expected() -> dict[str, Any]:
    """The single-device run: logits in float32 and bfloat16, greedy tokens."""
    model = load(torch.float32, quantization_config=ey.ExpertsConfig())
    half = load(torch.bfloat16, quantization_config=ey.ExpertsConfig())
    with torch.no_grad():
        return {
            "fp32": model(ids()).logits,
            "bf16": half(ids()).logits,
            "tokens": model.generate(ids(), max_new_tokens=24, do_sample=False),
        }


@pytest.mark.parametrize("name", REQUESTS)
def test_a_spread_model_computes_what_one_device_computes(
    name: str, expected: dict[str, Any]
) -> None:
    model = load(torch.float32, quantization_config=ey.ExpertsConfig(**REQUESTS[name]))
    plan = model.__dict__["_expertyard"].plan
    report = ey.verify(model)
    planned = {(layer.layer, g.device) for layer in plan.layers for g in layer.experts}
    assert {(row.layer, row.device) for row in report.layers} == planned
    with virtual.Guard(plan.layers[0].device), torch.no_grad():
        torch.testing.assert_close(model(ids()).logits, expected["fp32"], rtol=1e-5, atol=2e-5)
        for cache in ("dynamic", "static"):
            tokens = model.generate(
                ids(), max_new_tokens=24, do_sample=False, cache_implementation=cache
            )
            assert torch.equal(tokens, expected["tokens"]), cache


@pytest.mark.parametrize("name", ["two GPUs by rules", "half of each layer's experts"])
def test_bfloat16_differs_by_rounding_only(name: str, expected: dict[str, Any]) -> None:
    model = load(torch.bfloat16, quantization_config=ey.ExpertsConfig(**REQUESTS[name]))
    with torch.no_grad():
        got = model(ids()).logits
    assert (got - expected["bf16"]).abs().median() < 0.02
