# SPDX-License-Identifier: Apache-2.0
"""The module trees that are data here equal those of transformers: names, classes, shapes."""

from typing import Any

import pytest

from expertyard.spec import ModelSpec

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

SMALL = {
    "hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 96,
    "num_hidden_layers": 3, "intermediate_size": 80, "num_experts_per_tok": 2,
}  # fmt: skip
MLA = {
    "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 16, "v_head_dim": 12,
    "moe_intermediate_size": 24, "n_routed_experts": 8, "num_experts_per_tok": 2,
    "n_shared_experts": 2, "first_k_dense_replace": 1, "num_key_value_heads": 4, "n_group": 1,
    "topk_group": 1,
}  # fmt: skip
DELTA = {
    "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 8,
    "linear_value_head_dim": 6, "linear_conv_kernel_dim": 4, "shared_expert_intermediate_size": 20,
    "layer_types": ["linear_attention", "full_attention", "linear_attention"],
}  # fmt: skip
FAMILIES: dict[str, dict[str, Any]] = {
    "mixtral": {"num_local_experts": 4},
    "qwen2_moe": {
        "num_experts": 6, "moe_intermediate_size": 24, "shared_expert_intermediate_size": 40,
        "decoder_sparse_step": 2,
    },
    "qwen3_moe": {"num_experts": 6, "moe_intermediate_size": 24, "head_dim": 16,
        "mlp_only_layers": [1]},
    "olmoe": {"num_experts": 8, "num_experts_per_tok": 2},
    "deepseek_v2": {**MLA, "q_lora_rank": None},
    "deepseek_v3": {**MLA, "q_lora_rank": 20},
    "glm4_moe": {
        "n_routed_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 24,
        "n_shared_experts": 1, "first_k_dense_replace": 1, "use_qk_norm": True, "head_dim": 16,
        "attention_bias": True,
    },
    "gpt_oss": {"num_local_experts": 4, "head_dim": 16},
    "minimax_m2": {"num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 16},
    "llama4_text": {
        "num_local_experts": 4, "intermediate_size_mlp": 48, "interleave_moe_layer_step": 2,
        "head_dim": 16,
    },
    "qwen3_next": {**DELTA, "num_experts": 6, "moe_intermediate_size": 24, "head_dim": 16},
    "qwen3_5_moe_text": {**DELTA, "num_experts": 6, "moe_intermediate_size": 24, "head_dim": 16},
    "kimi_linear": {
        **MLA, "num_experts": 6, "num_experts_per_token": 2, "num_shared_experts": 1,
        "q_lora_rank": None, "pad_token_id": 0, "linear_head_dim": 8, "linear_num_heads": 3,
        "linear_conv_kernel_dim": 4,
        "layer_types": ["linear_attention", "full_attention", "linear_attention"],
        "mlp_layer_types": ["dense", "sparse", "sparse"],
    },
    "jamba": {
        "num_experts": 4, "attn_layer_period": 3, "attn_layer_offset": 1, "mamba_d_state": 6,
        "mamba_dt_rank": 5, "expert_layer_period": 2, "expert_layer_offset": 1,
    },
    "granitemoe": {"num_local_experts": 4},
    "granitemoeshared": {"num_local_experts": 4, "shared_intermediate_size": 20},
    "granitemoehybrid": {
        "num_local_experts": 4, "shared_intermediate_size": 20, "mamba_n_heads": 8,
        "mamba_d_head": 16, "mamba_d_state": 6, "position_embedding_type": "nope",
        "layer_types": ["mamba", "attention", "mamba"],
    },
    "phimoe": {"num_local_experts": 4, "attention_bias": True, "lm_head_bias": True},
    "ernie4_5_moe": {
        "moe_num_experts": 6, "moe_k": 2, "moe_intermediate_size": 24, "moe_num_shared_experts": 2,
        "moe_layer_start_index": 1, "moe_layer_end_index": 2, "tie_word_embeddings": False,
    },
    "exaone_moe": {"num_experts": 6, "moe_intermediate_size": 24, "num_shared_experts": 1,
        "head_dim": 16},
    "glm4_moe_lite": {**MLA, "q_lora_rank": 20},
    "solar_open": {"n_routed_experts": 6, "moe_intermediate_size": 24, "n_shared_experts": 1,
        "n_group": 1, "topk_group": 1, "head_dim": 16},
}  # fmt: skip


def build(model_type: str) -> tuple[Any, ModelSpec]:
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    config = CONFIG_MAPPING[model_type](**{**SMALL, **FAMILIES[model_type]})
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config)
    return model, ModelSpec.from_config(config.to_dict(), model_type)


@pytest.mark.parametrize("model_type", FAMILIES)
def test_tree_is_that_of_transformers(model_type: str) -> None:
    model, spec = build(model_type)
    ours = {m.name: m for m in spec.tree if not m.legacy}
    skipped = (
        "act_fn",
        "activation_fn",
        "activation",
        ".act",
        "qk_norm",
    )  # no weights, and in no rule
    theirs = {n: m for n, m in model.named_modules() if not n.endswith(skipped)}
    assert set(ours) == set(theirs)
    for name, module in theirs.items():
        assert type(module).__name__ in ours[name].classes, name
        if ours[name].part != "experts":
            shapes = [tuple(p.shape) for _, p in module.named_parameters(recurse=False)]
            assert sorted(ours[name].shapes) == sorted(shapes), name


@pytest.mark.parametrize("model_type", FAMILIES)
def test_parameters_are_counted_exactly(model_type: str) -> None:
    model, spec = build(model_type)
    assert spec.total_params == sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("model_type", FAMILIES)
def test_expert_shapes_are_those_of_transformers(model_type: str) -> None:
    model, spec = build(model_type)
    for number in spec.moe_layers:
        shape = spec.layers[number].experts
        assert shape is not None
        experts = next(m for m in spec.tree if m.layer == number and m.part == "experts")
        module = model.get_submodule(experts.name)
        assert module.num_experts == shape.num_experts
        size = sum(p.numel() for p in module.parameters())
        assert size == shape.num_experts * (shape.params + shape.bias_params)
