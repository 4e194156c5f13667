# SPDX-License-Identifier: Apache-2.0
"""The op in plain torch, in float64 by default: what every kernel is compared with.

Slow and obvious on purpose. It works for every format that can be turned into plain tensors.
"""

import math
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from .errors import KernelError

GATED = (
    "silu",
    "gelu_tanh",
    "swigluoai",
    "silu_clamp_before",
    "silu_clamp_after",
    "softcap_silu",
)
ACTIVATIONS = (*GATED, "relu2")

SWIGLU_OAI_ALPHA = 1.702
SWIGLU_OAI_LIMIT = 7.0


def has_gate(activation: str) -> bool:
    """Whether an activation takes a gate beside up."""
    return activation in GATED


def apply_activation(
    gate: Tensor | None,
    up: Tensor,
    activation: str,
    alpha: float = SWIGLU_OAI_ALPHA,
    limit: float = SWIGLU_OAI_LIMIT,
) -> Tensor:
    """h = act(gate, up), elementwise; gate and up of one shape and dtype.

    silu               silu(gate) * up
    gelu_tanh          gelu(gate, tanh approximation) * up
    swigluoai          g = min(gate, limit), u = clamp(up, -limit, limit):
                       (u + 1) * g * sigmoid(alpha * g), as in gpt-oss
    silu_clamp_before  silu(min(gate, limit)) * clamp(up, -limit, limit), as in DeepSeek-V4
    silu_clamp_after   min(silu(gate), limit) * clamp(up, -limit, limit), as in Step-3.7
    softcap_silu       alpha * tanh(gate / alpha) * sigmoid(gate) * limit * tanh(up / limit), as in
                       Inkling-2
    relu2              max(up, 0)^2, without a gate (which is None or ignored), as in Nemotron-H
    """
    if activation == "relu2":
        return up.clamp(min=0) ** 2
    if gate is None:
        raise KernelError(f"activation {activation!r} needs a gate, got None")
    if activation == "silu":
        return gate * torch.sigmoid(gate) * up
    if activation == "gelu_tanh":
        inner = math.sqrt(2 / math.pi) * (gate + 0.044715 * gate**3)
        return 0.5 * gate * (1 + torch.tanh(inner)) * up
    if activation == "swigluoai":
        gate = gate.clamp(max=limit)
        up = up.clamp(min=-limit, max=limit)
        return (up + 1) * gate * torch.sigmoid(alpha * gate)
    if activation == "silu_clamp_before":
        gate = gate.clamp(max=limit)
        return gate * torch.sigmoid(gate) * up.clamp(min=-limit, max=limit)
    if activation == "silu_clamp_after":
        return (gate * torch.sigmoid(gate)).clamp(max=limit) * up.clamp(min=-limit, max=limit)
    if activation == "softcap_silu":
        softcapped = alpha * torch.tanh(gate / alpha) * torch.sigmoid(gate)
        return softcapped * limit * torch.tanh(up / limit)
    raise KernelError(f"activation: expected one of {', '.join(ACTIVATIONS)}, got {activation!r}")


def split_gate_up(gate_up: Tensor, interleaved: bool) -> tuple[Tensor, Tensor]:
    """The gate and up halves of a [..., 2I] or, along dim -2, [..., 2I, H] tensor's row dimension.

    gate_up's rows are dimension 1 ([E, 2I] or [E, 2I, H]); both results are views.
    """
    if interleaved:
        return gate_up[:, 0::2], gate_up[:, 1::2]
    half = gate_up.shape[1] // 2
    return gate_up[:, :half], gate_up[:, half:]


ACTIVATION_GROUP = 128


def round_activations(x: Tensor, bits: int = 8) -> Tensor:
    """x [rows, cols] rounded to signed integers of `bits` bits, times one scale for each row and
    group of ACTIVATION_GROUP columns: scale = max |x| / (2^(bits - 1) - 1). Same dtype.

    The integers are found in float32, as kernels find them: bf16 values often lie halfway.
    """
    largest_integer = 2 ** (bits - 1) - 1
    rounded = []
    for group in x.split(ACTIVATION_GROUP, dim=1):
        largest = group.float().abs().amax(1, keepdim=True)
        # not number / tensor, which torch makes a reciprocal and a product: rounded twice
        inverse = torch.full_like(largest, largest_integer).div(largest)
        integers = (group.float() * torch.where(largest > 0, inverse, 0)).round()
        rounded.append(integers.to(x.dtype) * (largest / largest_integer).to(x.dtype))
    return torch.cat(rounded, dim=1)


def round_to_e4m3(x: Tensor) -> Tensor:
    """The same to e4m3, as mode "fast" does for fp8 weights on a GPU: scale = max |x| / 448."""
    largest_code = 448.0
    rounded = []
    for group in x.split(ACTIVATION_GROUP, dim=1):
        largest = group.float().abs().amax(1, keepdim=True)
        inverse = torch.full_like(largest, largest_code).div(largest)
        scaled = group.float() * torch.where(largest > 0, inverse, 0)
        codes = scaled.clamp(-largest_code, largest_code).to(torch.float8_e4m3fn)
        rounded.append(codes.to(x.dtype) * (largest / largest_code).to(x.dtype))
    return torch.cat(rounded, dim=1)


def moe_experts_reference(
    hidden_states: Tensor,
    topk_ids: Tensor,
    topk_weights: Tensor,
    gate_up: Tensor,
    down: Tensor,
    *,
    gate_up_bias: Tensor | None = None,
    down_bias: Tensor | None = None,
    activation: str = "silu",
    interleaved: bool = False,
    alpha: float = SWIGLU_OAI_ALPHA,
    limit: float = SWIGLU_OAI_LIMIT,
    dtype: torch.dtype = torch.float64,
    activation_bits: int | None = None,
    rounding: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:
    """sum_k topk_weights[t, k] * FFN[topk_ids[t, k]](hidden_states[t]), all of it in dtype.

    hidden_states [T, H], topk_ids [T, K] int, topk_weights [T, K], gate_up [E, 2I, H],
    down [E, H, I], gate_up_bias [E, 2I], down_bias [E, H]; returns [T, H] in dtype. Without a gate
    gate_up is up alone, [E, I, H], and so is its bias.
    An id of -1 or E adds nothing. activation_bits=8: hidden_states and h go through
    round_activations() first, as in mode "fast"; rounding: through this instead.
    """
    num_experts = down.shape[0]
    x, weights = hidden_states.to(dtype), topk_weights.to(dtype)
    out = torch.zeros_like(x)
    if activation_bits is not None:
        rounding = partial(round_activations, bits=activation_bits)
    if rounding is not None:
        x = rounding(x)
    gated = has_gate(activation)
    w_gate, w_up = split_gate_up(gate_up, interleaved) if gated else (gate_up, gate_up)
    biases = None
    if gate_up_bias is not None:
        one = (gate_up_bias, gate_up_bias)
        biases = split_gate_up(gate_up_bias, interleaved) if gated else one
    for expert in range(num_experts):
        token, k = torch.nonzero(topk_ids == expert, as_tuple=True)
        if token.numel() == 0:
            continue
        gate = x[token] @ w_gate[expert].to(dtype).T
        up = x[token] @ w_up[expert].to(dtype).T
        if biases is not None:
            gate = gate + biases[0][expert].to(dtype)
            up = up + biases[1][expert].to(dtype)
        h = apply_activation(gate, up, activation, alpha, limit)
        if rounding is not None:
            h = rounding(h)
        y = h @ down[expert].to(dtype).T
        if down_bias is not None:
            y = y + down_bias[expert].to(dtype)
        out.index_add_(0, token, y * weights[token, k, None])
    return out
