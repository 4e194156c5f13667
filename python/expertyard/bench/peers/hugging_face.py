# SPDX-License-Identifier: Apache-2.0
"""transformers' own experts on the very same bf16 weights: eager, and torch._grouped_mm."""

from functools import partial
from importlib.util import find_spec

import torch

from ..layer import Layer
from .base import EVERYTHING, Peer, Run


def _absent() -> str | None:
    return None if find_spec("transformers") else "transformers is not installed"


def _make(implementation: str, layer: Layer, base: str, threads: int) -> Run:
    from transformers import GptOssConfig, Qwen3MoeConfig
    from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts
    from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

    shape = layer.shape
    gate_up, down = layer.stacked()
    if shape.activation == "swigluoai":
        config = GptOssConfig(
            hidden_size=shape.hidden_size,
            intermediate_size=shape.intermediate_size,
            num_local_experts=shape.num_experts,
            num_experts_per_tok=shape.top_k,
        )
        with torch.device("meta"):
            module = GptOssExperts(config)
        assert layer.gate_bias is not None and layer.up_bias is not None
        assert layer.down_bias is not None
        tensors = {
            "gate_up_proj": gate_up.transpose(1, 2),
            "down_proj": down.transpose(1, 2),
            "gate_up_proj_bias": torch.stack((layer.gate_bias, layer.up_bias), 2)
            .flatten(1)
            .bfloat16(),
            "down_proj_bias": layer.down_bias.bfloat16(),
        }
    else:
        config = Qwen3MoeConfig(
            hidden_size=shape.hidden_size,
            moe_intermediate_size=shape.intermediate_size,
            num_experts=shape.num_experts,
            num_experts_per_tok=shape.top_k,
            hidden_act="silu",
        )
        with torch.device("meta"):
            module = Qwen3MoeExperts(config)
        tensors = {"gate_up_proj": gate_up, "down_proj": down}
    for name, tensor in tensors.items():
        setattr(module, name, torch.nn.Parameter(tensor, requires_grad=False))
    module.config._experts_implementation = implementation
    run: Run = module.eval()
    return run


HF_EAGER = Peer(
    name="hf_eager",
    about="transformers' experts as they come, bf16",
    beside=EVERYTHING,
    make=partial(_make, "eager"),
    bytes_per_weight={"bf16": 2},
    absent=_absent,
    activations=("silu", "swigluoai"),
)
HF_GROUPED_MM = Peer(
    name="hf_grouped_mm",
    about="transformers' experts over torch._grouped_mm, bf16",
    beside={"bf16": "bf16"},
    make=partial(_make, "grouped_mm"),
    bytes_per_weight={"bf16": 2},
    absent=_absent,
    activations=("silu", "swigluoai"),
)
