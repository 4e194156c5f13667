# SPDX-License-Identifier: Apache-2.0
"""Experts that do not use transformers' experts interface, and whose arithmetic is ours all the
same. Road A only: their modules are called in ways of their own.

Llama-4 weights the INPUT of an expert: y[t] = sum_e FFN_e(s[t, e] * x[t]), s = sigmoid of the
chosen scores and 0 elsewhere. Its module gets num_experts * num_tokens rows, weighted
already, expert by expert. FFN(0) = 0, so rows of zeros are "none" and only the chosen ones are
computed.
LongCat-Flash has experts that return their input: ids from num_experts on.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import KernelError
from ..loading import ExpertsLayout
from .module import ExpertyardExperts

__all__ = ["OUTSIDE", "is_outside", "outside_layout", "replacement"]


class Llama4Experts(ExpertyardExperts):
    """forward(hidden_states) with [num_experts * num_tokens, hidden_size] weighted rows."""

    def forward(  # type: ignore[override]
        self,
        hidden_states: Tensor,
        top_k_index: Tensor | None = None,
        top_k_weights: Tensor | None = None,
    ) -> Tensor:
        if top_k_index is not None and top_k_weights is not None:  # as verify() calls every module
            return super().forward(hidden_states, top_k_index, top_k_weights)
        rows = hidden_states.view(-1, self.layout.hidden_size)
        tokens = rows.shape[0] // self.num_experts
        ids = torch.arange(self.num_experts, device=rows.device).repeat_interleave(tokens)
        ids = torch.where((rows != 0).any(dim=-1), ids, -1)[:, None]
        return super().forward(rows, ids, torch.ones_like(ids, dtype=torch.float32))


class LongcatFlashExperts(ExpertyardExperts):
    """Ids from num_experts on stand for the input itself."""

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        same = top_k_index >= self.num_experts
        routed = super().forward(hidden_states, top_k_index.masked_fill(same, -1), top_k_weights)
        share = top_k_weights.masked_fill(~same, 0).sum(-1, keepdim=True)
        return routed + (hidden_states * share).to(hidden_states.dtype)


# transformers' class -> what replaces it
OUTSIDE: dict[str, type[ExpertyardExperts]] = {
    "Llama4TextExperts": Llama4Experts,
    "LongcatFlashExperts": LongcatFlashExperts,
}


def is_outside(module: nn.Module) -> bool:
    """Whether the module is one of the classes above, with weights."""
    return type(module).__name__ in OUTSIDE and getattr(module, "gate_up_proj", None) is not None


def outside_layout(module: Any, who: str) -> ExpertsLayout:
    """KernelError if its activation is not the one that the class has in every known checkpoint."""
    transposed = type(module).__name__ == "Llama4TextExperts"
    shape = tuple(module.down_proj.shape)
    experts, outer, inner = shape[0], shape[2 if transposed else 1], shape[1 if transposed else 2]
    with torch.no_grad(), torch.device("cpu"):
        probe = torch.linspace(-20, 20, 1001, dtype=torch.float64)
        if not torch.allclose(module.act_fn(probe), F.silu(probe)):
            raise KernelError(
                f"{who}: its activation is not silu, which is all that is known of it."
            )
    spare = int(module.gate_up_proj.shape[0]) - experts
    layout = ExpertsLayout(experts, outer, inner, "silu", transposed=transposed, spare=spare)
    got = tuple(module.gate_up_proj.shape)[1:]
    if got != layout.parameter_shapes()["gate_up_proj"][1:]:
        raise KernelError(f"{who}: gate_up_proj of shape {list(got)} is not known.")
    return layout


def replacement(module: nn.Module, layout: ExpertsLayout, config: Any) -> ExpertyardExperts:
    """The module without weights that takes the place of an experts module."""
    return OUTSIDE.get(type(module).__name__, ExpertyardExperts)(layout, config)
