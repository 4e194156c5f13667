# SPDX-License-Identifier: Apache-2.0
"""The contenders: our op, and transformers' own experts on the very same weights."""

from collections.abc import Callable

import torch
from torch import Tensor

from ..testing import Problem
from .shapes import Shape

Run = Callable[[Tensor, Tensor, Tensor], Tensor]  # hidden_states, topk_ids, topk_weights -> out

PEERS = ("hf_eager", "hf_grouped_mm")


def hugging_face(shape: Shape, problem: Problem, implementation: str) -> Run:
    """transformers' experts module of this shape, holding problem's tensors (no copy)."""
    from transformers import GptOssConfig, Qwen3MoeConfig
    from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts
    from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

    parameter = {"requires_grad": False}
    if shape.activation == "swigluoai":
        config = GptOssConfig(
            hidden_size=shape.hidden_size,
            intermediate_size=shape.intermediate_size,
            num_local_experts=shape.num_experts,
            num_experts_per_tok=shape.top_k,
        )
        with torch.device("meta"):
            module = GptOssExperts(config)
        dtype = problem.gate_up.dtype
        assert problem.gate_up_bias is not None and problem.down_bias is not None
        tensors = {
            "gate_up_proj": problem.gate_up.transpose(1, 2),
            "down_proj": problem.down.transpose(1, 2),
            "gate_up_proj_bias": problem.gate_up_bias.to(dtype),
            "down_proj_bias": problem.down_bias.to(dtype),
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
        tensors = {"gate_up_proj": problem.gate_up, "down_proj": problem.down}
    for name, tensor in tensors.items():
        setattr(module, name, torch.nn.Parameter(tensor, **parameter))
    module.config._experts_implementation = implementation
    run: Run = module.eval()
    return run


def contenders(shape: Shape, problem: Problem, peers: tuple[str, ...]) -> dict[str, Run]:
    """Name -> callable; ours is called "expertyard"."""
    packed = problem.pack()
    op = torch.ops.expertyard.moe_experts

    def ours(hidden_states: Tensor, topk_ids: Tensor, topk_weights: Tensor) -> Tensor:
        out: Tensor = op(hidden_states, topk_ids, topk_weights, packed.handle)
        return out

    runs: dict[str, Run] = {"expertyard": ours}
    for peer in peers:
        runs[peer] = hugging_face(shape, problem, peer.removeprefix("hf_"))
    return runs
