# SPDX-License-Identifier: Apache-2.0
"""ExpertyardExperts: the module that stands where a family's experts module stood (road A).

It has no parameters, so transformers loads none, `.to()` moves none and accelerate hooks none: the
packed experts stay where the plan put them, and hidden states come to them and go back.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ..dispatch import LayerExperts
from ..errors import KernelError
from ..loading import ExpertsLayout

__all__ = ["ExpertyardExperts"]


class ExpertyardExperts(nn.Module):
    """Drop-in for `mlp.experts`: forward(hidden_states, top_k_index, top_k_weights)."""

    experts: LayerExperts | None

    def __init__(self, layout: ExpertsLayout, config: Any = None) -> None:
        super().__init__()
        self.layout = layout
        self.config = config
        self.num_experts = layout.num_experts
        self.experts = None  # until the checkpoint's experts have been read
        # work of the block's for the time in which other devices compute: shared.py
        self.meanwhile: Callable[[], Callable[[], None] | None] | None = None

    def stand_in(self, there: bool) -> None:
        """Puts nothing under the names of the experts' parameters, or takes it away again.

        Some families initialise experts from the block around them (Qwen3-Omni's _init_weights
        reaches for module.experts.gate_up_proj), whether or not anything is missing.
        """
        theirs = (name for ours in self.layout.parameters for name in self.layout.names_of(ours))
        for name in theirs:
            if "." in name:
                continue  # of a module below, which the replacement does not have
            if there:
                nothing = torch.empty(0)
                nothing._is_hf_initialized = True  # type: ignore[attr-defined]
                setattr(self, name, nothing)
            else:
                delattr(self, name)

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """[num_tokens, hidden_size] -> the same shape, dtype and device."""
        experts = self.experts
        if experts is None:
            raise KernelError("These experts hold no weights: loading the model did not finish.")
        if self.meanwhile is None:
            return experts(hidden_states, top_k_index, top_k_weights)
        return experts(hidden_states, top_k_index, top_k_weights, self.meanwhile())

    def extra_repr(self) -> str:
        layout, experts = self.layout, self.experts
        where = "empty" if experts is None else str(experts.placement)
        return (
            f"num_experts={layout.num_experts}, hidden_size={layout.hidden_size}, "
            f"intermediate_size={layout.intermediate_size}, {layout.activation}, {where}"
        )
