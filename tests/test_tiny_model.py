# SPDX-License-Identifier: Apache-2.0
"""The embedded model is what its facts say, and it writes English."""

from __future__ import annotations

import json
import re
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import expertyard.models
from expertyard.errors import LoadError
from expertyard.models import tiny_moe
from expertyard.models.perplexity import perplexity

transformers = pytest.importorskip("transformers")

FACTS = json.loads((tiny_moe() / "facts.json").read_text(encoding="utf-8"))
HELD_OUT = (tiny_moe() / "heldout.txt").read_text(encoding="utf-8")
SLICE = HELD_OUT.encode()[: FACTS["held_out"]["slice"]["bytes"]].decode()


@cache
def load(dtype: torch.dtype) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(
        tiny_moe(), dtype=dtype, experts_implementation="eager"
    ).eval()


@cache
def tokenizer() -> Any:
    return transformers.AutoTokenizer.from_pretrained(tiny_moe())


def words(text: str) -> list[str]:
    return re.findall(r"[a-z]{3,}", text.lower())


def test_the_checkpoint_is_small_and_its_layers_are_sparse() -> None:
    assert (tiny_moe() / "model.safetensors").stat().st_size <= 16_000_000
    model = load(torch.bfloat16)
    assert sum(p.numel() for p in model.parameters()) == FACTS["parameters"]
    assert model.config.num_experts >= 16
    assert model.config.num_experts_per_tok >= 2
    assert all(hasattr(layer.mlp, "experts") for layer in model.model.layers)


# fp32 differs between machines by the order of sums only; bf16 by where a CPU rounds
@pytest.mark.parametrize(
    ("key", "dtype", "tolerance"),
    [("hf_fp32", torch.float32, 1e-4), ("hf_bf16_eager", torch.bfloat16, 5e-3)],
    ids=["fp32", "bf16"],
)
def test_held_out_perplexity_is_the_recorded_one(
    key: str, dtype: torch.dtype, tolerance: float
) -> None:
    held_out = FACTS["held_out"]
    result = perplexity(
        load(dtype), SLICE, tokenizer(), window=held_out["window"], stride=held_out["stride"]
    )
    assert result.num_bytes == held_out["slice"]["bytes"]
    expected = held_out["slice"][key]
    assert result.perplexity == pytest.approx(expected["perplexity"], rel=tolerance)
    assert result.bits_per_byte == pytest.approx(expected["bits_per_byte"], rel=tolerance)


@given(st.text())
@settings(max_examples=200, deadline=None)
def test_every_text_survives_the_tokenizer(text: str) -> None:
    ids = tokenizer()(text)["input_ids"]
    assert ids == list(text.encode())
    assert tokenizer().decode(ids, clean_up_tokenization_spaces=False) == text


@pytest.mark.parametrize("text", ["", "a<|endoftext|>b", "\x00\r\n\t ", " ,a .b 's", "né 日本 🚂"])
def test_awkward_text_survives_the_tokenizer(text: str) -> None:
    ids = tokenizer()(text)["input_ids"]
    assert ids == list(text.encode())
    assert tokenizer().decode(ids) == text
    assert tokenizer().decode(ids, skip_special_tokens=True) == text


def test_every_expert_of_every_layer_is_chosen_by_held_out_text() -> None:
    model = load(torch.float32)
    ids = tokenizer()(SLICE, return_tensors="pt", verbose=False)["input_ids"]
    even = ids.numel() * model.config.num_experts_per_tok / model.config.num_experts
    total = torch.zeros(model.config.num_hidden_layers, model.config.num_experts)
    for start in range(0, ids.shape[1], 512):
        with torch.no_grad():
            out = model.model(input_ids=ids[:, start : start + 512], output_router_logits=True)
        for layer, logits in enumerate(out.router_logits):
            chosen = logits.topk(model.config.num_experts_per_tok).indices.flatten()
            total[layer] += torch.bincount(chosen, minlength=model.config.num_experts)
    assert total.min() > even / 20, total  # none is dead
    assert total.max() < even * 5, total  # and none does it all


def test_it_writes_printable_english() -> None:
    """Words of the continuation are words of the held-out text as often as real text's are.

    The yardstick is real text of the same author: how many words of one half of the held-out
    sample are in the other. Letters drawn at the frequencies of English fall far below.
    """
    half = len(HELD_OUT) // 2
    known = set(words(HELD_OUT[:half]))
    unseen = words(HELD_OUT[half:])
    yardstick = sum(word in known for word in unseen) / len(unseen)
    model = load(torch.float32)  # HF's eager bf16 is many times slower at one token
    written = []
    for seed, prompt in enumerate(("The function returns", "If you want to", "This module")):
        ids = torch.tensor([[tokenizer().bos_token_id, *prompt.encode()]])
        torch.manual_seed(seed)
        out = model.generate(ids, max_new_tokens=160, do_sample=True, temperature=0.45, top_k=0)
        text = tokenizer().decode(out[0], skip_special_tokens=True)
        assert text.startswith(prompt)
        assert all(c.isprintable() or c in "\n\t" for c in text), text
        written += words(text[len(prompt) :])
    share = sum(word in known for word in written) / len(written)
    assert share > 0.85 * yardstick, (share, yardstick, written)
    assert len(set(written)) > 0.4 * len(written), written  # it does not just repeat itself

    letters = [c for c in HELD_OUT.lower() if c.isalpha() or c == " "]
    shuffled = torch.randperm(len(letters), generator=torch.Generator().manual_seed(0)).tolist()
    control = words("".join(letters[i] for i in shuffled))
    assert sum(word in known for word in control) / len(control) < 0.5 * yardstick


def test_a_missing_model_is_a_sentence(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(expertyard.models, "__file__", str(tmp_path / "__init__.py"))
    with pytest.raises(LoadError, match=r"model\.safetensors is missing"):
        tiny_moe()
