# SPDX-License-Identifier: Apache-2.0
"""What our kernels cost in quality, on the trained model: nothing that can be measured.

The truth is the same bf16 weights computed in float32. Hugging Face's own bf16 code is the bar.
"""

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import expertyard as ey
from expertyard.models import tiny_moe
from expertyard.models.perplexity import perplexity
from expertyard.testing import calc_diff

HELD_OUT = (tiny_moe() / "heldout.txt").read_text(encoding="utf-8")


def load(dtype=torch.bfloat16, **options):
    return AutoModelForCausalLM.from_pretrained(tiny_moe(), dtype=dtype, **options).eval()


@pytest.fixture(scope="module")
def models():
    return {
        "fp32": load(torch.float32, experts_implementation="eager"),
        "eager": load(experts_implementation="eager"),
        "load": load(quantization_config=ey.ExpertsConfig()),
        "implementation": load(experts_implementation="expertyard"),
    }


@torch.no_grad()
def test_bf16_logits_are_no_further_from_float32_than_eagers(models) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_moe())
    errors = {name: 0.0 for name in models if name != "fp32"}
    for start in range(0, 1536, 512):
        ids = tokenizer(HELD_OUT[start : start + 512], return_tensors="pt").input_ids
        truth = models["fp32"](ids).logits
        for name in errors:
            errors[name] += calc_diff(models[name](ids).logits, truth)
    assert errors["load"] <= errors["eager"]
    assert errors["implementation"] <= errors["eager"]


def test_perplexity_is_hugging_faces_within_two_per_mille(models) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_moe())
    text = HELD_OUT[:2048]
    values = {name: perplexity(m, text, tokenizer).perplexity for name, m in models.items()}
    for road in ("load", "implementation"):
        assert values[road] == pytest.approx(values["eager"], rel=2e-3)
        assert values[road] == pytest.approx(values["fp32"], rel=2e-3)
