# SPDX-License-Identifier: Apache-2.0
"""Tiny random models of every family that the Hugging Face tests run. Not a test itself.

hidden_size 72 and intermediate_size 40 are multiples of neither 64 nor 16: tails count. Weights are
large enough for the experts to decide the logits, which test_hf_roads checks.
"""

from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

VOCAB = 89
_COMMON = {
    "vocab_size": VOCAB,
    "hidden_size": 72,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 18,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": None,
    "eos_token_id": None,
    "tie_word_embeddings": False,
}
_QWEN = {"moe_intermediate_size": 40, "intermediate_size": 56, "num_experts": 8}
_MLA = {"q_lora_rank": 24, "kv_lora_rank": 20, "qk_nope_head_dim": 12, "qk_rope_head_dim": 8}
_GROUPS = {"n_routed_experts": 8, "n_shared_experts": 1, "first_k_dense_replace": 1}
FAMILIES: dict[str, dict[str, Any]] = {
    "mixtral": {"intermediate_size": 40, "num_local_experts": 6, "num_experts_per_tok": 2},
    "qwen2_moe": {
        **_QWEN,
        "num_experts_per_tok": 3,
        "shared_expert_intermediate_size": 48,
        "decoder_sparse_step": 1,
    },
    "qwen3_moe": {**_QWEN, "num_experts_per_tok": 3, "mlp_only_layers": [0]},
    "olmoe": {"intermediate_size": 40, "num_experts": 8, "num_experts_per_tok": 3},
    "deepseek_v3": {
        **_GROUPS,
        **_MLA,
        "moe_intermediate_size": 40,
        "intermediate_size": 56,
        "num_experts_per_tok": 3,
        "v_head_dim": 16,
        "head_dim": 8,
        "num_key_value_heads": 4,
        "n_group": 4,
        "topk_group": 2,
    },
    "glm4_moe": {
        **_GROUPS,
        "moe_intermediate_size": 40,
        "intermediate_size": 56,
        "num_experts_per_tok": 3,
        "n_group": 2,
        "topk_group": 1,
    },
    "gpt_oss": {
        "intermediate_size": 40,
        "num_local_experts": 6,
        "num_experts_per_tok": 2,
        "sliding_window": 16,
        "layer_types": ["sliding_attention", "full_attention"],
    },
}


def tiny_config(family: str, **changes: Any) -> Any:
    return AutoConfig.for_model(family, **{**_COMMON, **FAMILIES[family], **changes})


def tiny_model(
    family: str, dtype: torch.dtype = torch.float32, seed: int = 0, **changes: Any
) -> Any:
    """A random model whose weights are exact in bfloat16, whatever its dtype."""
    model = AutoModelForCausalLM.from_config(tiny_config(family, **changes), dtype=torch.float32)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            if "norm" in name or not tensor.is_floating_point() or "inv_freq" in name:
                continue
            scale = 0.5 if "bias" in name else tensor.shape[-1] ** -0.5
            tensor.copy_((torch.randn(tensor.shape, generator=generator) * scale).bfloat16())
    return model.to(dtype).eval()


def save(model: Any, folder: Path, **options: Any) -> Path:
    model.save_pretrained(folder, **options)
    return folder


def prompts(batch: int = 3, length: int = 11, seed: int = 1) -> dict[str, torch.Tensor]:
    """A batch of prompts of unequal length, padded on the left."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(1, VOCAB, (batch, length), generator=generator)
    mask = torch.ones_like(ids)
    for row in range(1, batch):
        ids[row, : 2 * row] = 0
        mask[row, : 2 * row] = 0
    return {"input_ids": ids, "attention_mask": mask}


def load(folder: Path, dtype: torch.dtype = torch.float32, **options: Any) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, **options).eval()


@torch.no_grad()
def logits(model: Any, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """Logits of the tokens that are not padding, in float32."""
    out: torch.Tensor = model(**batch).logits.float()
    return out[batch["attention_mask"].bool()]


def greedy(model: Any, batch: dict[str, torch.Tensor], tokens: int = 12, **options: Any) -> Any:
    return model.generate(**batch, max_new_tokens=tokens, do_sample=False, **options)
