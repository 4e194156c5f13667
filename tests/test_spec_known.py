# SPDX-License-Identifier: Apache-2.0
"""Known models without any file: parameter counts and bytes per expert are the published ones."""

import pytest

from expertyard.errors import SpecError
from expertyard.spec import ModelSpec
from expertyard.spec.known import known_models

MIB, GIB = 1 << 20, 1 << 30

# model: layers, dense first, total and active parameters in billions, parameters that are no routed
# expert, millions of weights an expert, MiB an expert and GiB of all experts (bf16, fp8, int4), KV
TABLE = {
    "Mixtral-8x7B": (
        32,
        0,
        46.70,
        12.75,
        1.61,
        176.16,
        (336, 168.0, 86.6),
        (84.0, 42.0, 21.7),
        2048,
    ),
    "Qwen3-30B-A3B": (48, 0, 30.53, 3.04, 1.54, 4.72, (9.0, 4.50, 2.32), (54.0, 27.0, 13.9), 1024),
    "DeepSeek-V3": (61, 3, 671.03, 36.6, 17.12, 44.04, (84, 42.0, 21.66), (1218, 609, 314), 576),
    "GLM-4.5-Air": (46, 1, 106.85, 12.8, 7.20, 17.30, (33, 16.5, 8.51), (185.6, 92.8, 47.9), 2048),
    "gpt-oss-120b": (
        36,
        0,
        116.83,
        5.13,
        2.13,
        24.88,
        (47.5, 23.7, 12.2),
        (213.6, 106.8, 55.1),
        1024,
    ),
    "Kimi-K2": (61, 1, 1026.4, 31.7, 11.72, 44.04, (84, 42.0, 21.66), (1890, 945, 487), 576),
}


def same(value: float, published: float) -> bool:
    """Equal in all digits that are published."""
    digits = len(str(published).partition(".")[2]) if isinstance(published, float) else 0
    return round(value, digits) == published


@pytest.mark.parametrize("name", TABLE)
def test_published_sizes_come_out(name: str) -> None:
    layers, dense, total, active, other, params, expert_mib, all_gib, kv = TABLE[name]
    spec = ModelSpec.from_family(name)
    moe = spec.layers[spec.moe_layers[0]]
    assert moe.experts is not None
    assert (spec.num_layers, spec.num_layers - len(spec.moe_layers)) == (layers, dense)
    assert same(spec.total_params / 1e9, total)
    assert same(spec.active_params / 1e9, active)
    assert same((spec.total_params - spec.routed_params) / 1e9, other)
    assert same(moe.experts.params / 1e6, params)
    assert moe.kv_elements == kv
    for fmt, mib, gib in zip(("bf16", "fp8", "int4"), expert_mib, all_gib, strict=True):
        size = moe.expert_bytes(fmt)
        assert same(size / MIB, mib), fmt
        assert same(size * moe.experts.num_experts * len(spec.moe_layers) / GIB, gib), fmt


def test_gpt_oss_in_its_own_format() -> None:
    spec = ModelSpec.from_family("gpt-oss-120b")
    layer = spec.layers[0]
    assert round(layer.expert_bytes("mxfp4") / MIB, 1) == 12.6
    assert round(layer.expert_bytes("mxfp4") * 128 * 36 / GIB, 1) == 56.7
    assert layer.expert_bias_bytes("mxfp4") == 2 * (2 * 2880 + 2880)


@pytest.mark.parametrize(
    ("name", "billions"),
    [
        ("Mixtral-8x22B", 140.6), ("Qwen3-235B-A22B", 235.1), ("DeepSeek-V2-Lite", 15.7),
        ("DeepSeek-R1", 671.0), ("gpt-oss-20b", 20.9), ("OLMoE", 6.9), ("MiniMax-M2", 228.7),
        ("Llama-4-Maverick", 401.5), ("DeepSeek-V2", 235.7),
    ],
)  # fmt: skip
def test_other_totals(name: str, billions: float) -> None:
    assert round(ModelSpec.from_family(name).total_params / 1e9, 1) == billions


@pytest.mark.parametrize(
    ("written", "name"),
    [
        ("deepseek-ai/DeepSeek-R1-0528", "DeepSeek-R1"),
        ("Qwen/Qwen3-30B-A3B-Instruct-2507", "Qwen3-30B-A3B"),
        ("mixtral 8x7b", "Mixtral-8x7B"),
        ("openai/gpt-oss-120b", "gpt-oss-120b"),
        ("moonshotai/Kimi-K2-Instruct", "Kimi-K2"),
        ("Llama-4-Scout-17B-16E-Instruct", "Llama-4-Scout"),
        ("GLM-4.5-Air-FP8", "GLM-4.5-Air"),
    ],
)
def test_names_are_found_as_people_write_them(written: str, name: str) -> None:
    assert ModelSpec.from_family(written).name == name


def test_an_unknown_name_gets_the_nearest() -> None:
    with pytest.raises(SpecError, match="DeepSeek-V3"):
        ModelSpec.from_family("DeepSeek-V3000")


def test_every_known_model_is_consistent() -> None:
    for name in known_models():
        spec = ModelSpec.from_family(name)
        assert spec.known_family, name
        assert spec.moe_layers, name
        in_tree = {module.layer for module in spec.tree if module.part == "experts"}
        assert in_tree == set(spec.moe_layers), name


def test_moe_layers_of_llama_4_maverick_alternate() -> None:
    spec = ModelSpec.from_family("Llama-4-Maverick")
    assert spec.moe_layers == tuple(range(1, 48, 2))
    assert spec.vision


@pytest.mark.parametrize(
    "own",
    [
        {"num_experts": 64, "moe_topk": [8] * 4, "moe_intermediate_size": [24] * 4,
         "num_shared_expert": [1] * 4},
        {"moe_num_primary_experts": 64, "moe_num_active_primary_experts": 8,
         "moe_ffn_hidden_size": 24},
    ],
)  # fmt: skip
def test_other_families_words_and_lists_of_one_number(own: dict[str, object]) -> None:
    """HunYuan writes one number a layer, SmallThinker has words of its own."""
    common = {"model_type": "new", "num_hidden_layers": 4, "hidden_size": 64, "vocab_size": 96,
              "num_attention_heads": 4, "intermediate_size": 80}  # fmt: skip
    spec = ModelSpec.from_config({**common, **own})
    shape = spec.layers[0].experts
    assert shape is not None and not spec.known_family
    assert (shape.num_experts, shape.top_k, shape.intermediate_size) == (64, 8, 24)


def test_lists_of_different_numbers_are_refused() -> None:
    config = {"num_hidden_layers": 2, "hidden_size": 64, "vocab_size": 96,
              "num_attention_heads": 4, "num_experts": [4, 8], "top_k": 2}  # fmt: skip
    with pytest.raises(SpecError, match="num_experts: expected a whole number"):
        ModelSpec.from_config(config)
