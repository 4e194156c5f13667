# SPDX-License-Identifier: Apache-2.0
"""ExpertyardExperts: the module that stands where a family's experts module stood (road A).

It has no parameters, so transformers loads none, `.to()` moves none and accelerate hooks none: the
packed experts stay where the plan put them, and hidden states come to them and go back.
"""

from typing import Any

from torch import Tensor, nn

from ..errors import KernelError
from ..loading import ExpertsLayout
from ..ops import moe_experts
from ..weights import PackedExperts

__all__ = ["ExpertyardExperts", "run"]


def run(packed: PackedExperts, hidden_states: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
    """moe_experts() where the packed experts are; the result is back where hidden_states are."""
    here, there = hidden_states.device, packed.device
    if here == there:
        return moe_experts(hidden_states, ids, weights, packed)
    return moe_experts(hidden_states.to(there), ids.to(there), weights.to(there), packed).to(here)


class ExpertyardExperts(nn.Module):
    """Drop-in for `mlp.experts`: forward(hidden_states, top_k_index, top_k_weights)."""

    packed: PackedExperts | None

    def __init__(self, layout: ExpertsLayout, config: Any = None) -> None:
        super().__init__()
        self.layout = layout
        self.config = config
        self.num_experts = layout.num_experts
        self.packed = None  # until the checkpoint's experts have been read

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """[num_tokens, hidden_size] -> the same shape, dtype and device."""
        packed = self.packed
        if packed is None:
            raise KernelError("These experts hold no weights: loading the model did not finish.")
        return run(packed, hidden_states, top_k_index, top_k_weights)

    def extra_repr(self) -> str:
        layout, packed = self.layout, self.packed
        where = "empty" if packed is None else f"{packed.format} on {packed.device}"
        return (
            f"num_experts={layout.num_experts}, hidden_size={layout.hidden_size}, "
            f"intermediate_size={layout.intermediate_size}, {layout.activation}, {where}"
        )
