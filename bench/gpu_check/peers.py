# SPDX-License-Identifier: Apache-2.0
"""Other people's ways to compute a layer on the card, in bf16; None where one is not installed or
does not know the layer. Results are checked once against ours before anything is timed.
"""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

from torch import Tensor

from expertyard.bench.peers.hugging_face import HF_GROUPED_MM
from expertyard.bench.shapes import Shape
from expertyard.testing import Problem

Run = Callable[[Tensor, Tensor, Tensor], Tensor]


def make(name: str, shape: Shape, weights: Problem) -> Run | None:
    """hidden_states, topk_ids (int64), topk_weights (fp32) -> out, on weights' device."""
    if shape.activation not in ACTIVATIONS[name]:
        return None
    return MAKERS[name](shape, weights)


def _hugging_face(implementation: str) -> Callable[[Shape, Problem], Run | None]:
    """transformers' module: grouped_mm is torch's, batched_mm copies every pair's weights."""

    def make(shape: Shape, w: Problem) -> Run | None:
        if HF_GROUPED_MM.absent() is not None:
            return None
        inner = shape.intermediate_size
        bias: dict[str, Any] = {"gate_bias": None, "up_bias": None, "down_bias": None}
        if w.gate_up_bias is not None and w.down_bias is not None:
            rows = w.gate_up_bias.unflatten(1, (inner, 2))  # interleaved, as gpt-oss has them
            bias = {
                "gate_bias": rows[..., 0],
                "up_bias": rows[..., 1],
                "down_bias": w.down_bias,
            }
        layer: Any = SimpleNamespace(shape=shape, stacked=lambda: (w.gate_up, w.down), **bias)
        module: Any = HF_GROUPED_MM.make(layer, "bf16", 0)
        module.config._experts_implementation = implementation
        run: Run = module
        return run

    return make


def _triton(shape: Shape, w: Problem) -> Run | None:
    try:
        from .triton_moe import fused_moe
    except ImportError:
        return None
    return lambda x, ids, weights: fused_moe(x, ids, weights, w.gate_up, w.down)


def _vllm(shape: Shape, w: Problem) -> Run | None:
    try:
        from vllm.model_executor.layers.fused_moe import fused_experts
    except ImportError:
        return None

    def run(x: Tensor, ids: Tensor, topk_weights: Tensor) -> Tensor:
        out: Tensor = fused_experts(x, w.gate_up, w.down, topk_weights, ids.int())
        return out

    return run


MAKERS: dict[str, Callable[[Shape, Problem], Run | None]] = {
    "hf_grouped_mm": _hugging_face("grouped_mm"),
    "hf_batched_mm": _hugging_face("batched_mm"),
    "triton_fused_moe": _triton,
    "vllm_fused_experts": _vllm,
}
ACTIVATIONS = {name: ("silu", "swigluoai") if name.startswith("hf_") else ("silu",)
               for name in MAKERS}  # fmt: skip
