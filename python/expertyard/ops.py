# SPDX-License-Identifier: Apache-2.0
"""The torch operator, its fake kernel and its backward, which refuses."""

from typing import Any

import torch
from torch import Tensor

from .errors import KernelError
from .native import _C as _C  # registers the operator
from .weights import PackedExperts

_MARK = "expertyard: "  # how ops.cpp begins its messages


def moe_experts(
    hidden_states: Tensor, topk_ids: Tensor, topk_weights: Tensor, experts: PackedExperts
) -> Tensor:
    """Sums each token's chosen experts: topk_weights[t, k] * FFN[topk_ids[t, k]](hidden_states[t]).

    hidden_states  [num_tokens, hidden_size] bfloat16, float16 or float32
    topk_ids       [num_tokens, top_k] int32 or int64; -1 or num_experts means "none"
    topk_weights   [num_tokens, top_k] float32 or a 16-bit float, used as they are
    returns        [num_tokens, hidden_size] in hidden_states' dtype, on its device, contiguous
    Raises KernelError for a wrong shape, dtype, device or id, and if no kernel serves the call.
    num_tokens may be 0. Sums and the weighted combine are in float32, rounded once. No gradient:
    backward raises.

    torch.ops.expertyard.moe_experts is the same with experts.handle; there errors are
    RuntimeErrors that start with "expertyard: ".
    """
    try:
        out: Tensor = torch.ops.expertyard.moe_experts(
            hidden_states, topk_ids, topk_weights, experts.handle
        )
    except RuntimeError as error:
        if isinstance(error, KernelError) or _MARK not in str(error):
            raise
        message = str(error).split(_MARK, 1)[1].split("\n", 1)[0]
        raise KernelError(message) from None
    return out


@torch.library.register_fake("expertyard::moe_experts")
def _fake(hidden_states: Tensor, topk_ids: Tensor, topk_weights: Tensor, experts: int) -> Tensor:
    torch._check(hidden_states.dim() == 2, lambda: _MARK + "hidden_states: expected 2 dimensions")
    torch._check(
        topk_ids.dim() == 2 and topk_ids.shape == topk_weights.shape,
        lambda: _MARK + "topk_ids and topk_weights: expected one shape [num_tokens, top_k]",
    )
    torch._check(
        topk_ids.shape[0] == hidden_states.shape[0],
        lambda: _MARK + "topk_ids: expected as many rows as hidden_states",
    )
    return hidden_states.new_empty(hidden_states.shape)


def _no_backward(ctx: Any, grad: Tensor) -> Any:
    raise KernelError(
        "expertyard::moe_experts has no gradient: its experts are for inference. To train, use "
        "another experts implementation, e.g. model.set_experts_implementation('grouped_mm')"
    )


torch.library.register_autograd("expertyard::moe_experts", _no_backward)
