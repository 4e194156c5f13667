# SPDX-License-Identifier: Apache-2.0
"""The torch operator, its fake kernel and its backward, which refuses."""

from typing import Any

import torch
from torch import Tensor

from .errors import DeviceError, KernelError
from .native import _C as _C  # registers the operator
from .weights import PackedExperts

_MARK = "expertyard: "  # how ops.cpp begins its messages
_DEVICE = "device: "  # and goes on where a device is at fault


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
        raise _translated(error) from None
    return out


def moe_experts_into(
    hidden_states: Tensor,
    topk_ids: Tensor,
    topk_weights: Tensor,
    experts: PackedExperts,
    out: Tensor,
) -> None:
    """moe_experts() into `out` [num_tokens, hidden_size], contiguous, which is wholly written.

    out  float32: nothing is rounded, so that parts of a sum can be added; or hidden_states' dtype
    No gradient and no complaint about that: callers see to it. Raises KernelError.
    """
    try:
        torch.ops.expertyard.moe_experts_into(
            hidden_states, topk_ids, topk_weights, experts.handle, out
        )
    except RuntimeError as error:
        raise _translated(error) from None


def moe_parts(
    hidden_states: Tensor,
    topk_ids: Tensor,
    topk_weights: Tensor,
    experts: list[int],
    lanes: list[int],
    *,
    timeout: float,
    layer: int,
    fp32: bool,
) -> Tensor:
    """The sum of several parts of one layer, all in this machine's memory, computed together.

    experts  handles of PackedExperts
    lanes    whose thread computes each: -1, the caller's; N >= 0, that of virtual GPU N
    timeout  seconds for each lane
    layer    its number, for messages
    fp32     True: the sum as it is; else rounded once to hidden_states' dtype
    Arguments and errors otherwise as moe_experts'; DeviceError for a lane that does not end in
    time. The experts' memory must stay what it is until then, and after such an error for good.
    """
    try:
        out: Tensor = torch.ops.expertyard.moe_parts(
            hidden_states, topk_ids, topk_weights, experts, lanes, timeout, layer, fp32
        )
    except RuntimeError as error:
        raise _translated(error) from None
    return out


def ask_cpu(
    hidden_states: Tensor, topk_ids: Tensor, topk_weights: Tensor, experts: PackedExperts, desk: int
) -> Tensor:
    """Queues a question of a GPU: the share of experts that are in RAM. All tensors are on the GPU.

    desk  of _C.add_desk, for calls of this shape
    Returns a ticket for collect_cpu(), which must be queued on the same stream before the next
    question of the same desk. Raises DeviceError or KernelError: what went wrong with an earlier
    question, whose result is NaN.
    """
    try:
        ticket: Tensor = torch.ops.expertyard.ask_cpu(
            hidden_states, topk_ids, topk_weights, experts.handle, desk
        )
    except RuntimeError as error:
        raise _translated(error) from None
    return ticket


def collect_cpu(ticket: Tensor, share: Tensor, desk: int) -> Tensor:
    """Queues the sum of the CPU's answer and `share`, rounded once to the question's dtype.

    share  [num_tokens, hidden_size] float32 on the GPU, or without elements: there is none
    """
    try:
        out: Tensor = torch.ops.expertyard.collect_cpu(ticket, share, desk)
    except RuntimeError as error:
        raise _translated(error) from None
    return out


def send_away(
    hidden_states: Tensor, topk_ids: Tensor, topk_weights: Tensor, experts: PackedExperts, away: int
) -> Tensor:
    """Queues a question of one GPU to another: the share of experts that are there.

    away  of _C.add_away, for calls of this shape in one CUDA graph
    Arguments are contiguous, and stay what they are until collect_away() has been called with what
    this returns: where the share will be, [num_tokens, hidden_size] float32.
    """
    try:
        arrived: Tensor = torch.ops.expertyard.send_away(
            hidden_states, topk_ids, topk_weights, experts.handle, away
        )
    except RuntimeError as error:
        raise _translated(error) from None
    return arrived


def collect_away(arrived: Tensor, away: int) -> None:
    """What is queued after this finds the share."""
    try:
        torch.ops.expertyard.collect_away(arrived, away)
    except RuntimeError as error:
        raise _translated(error) from None


def _translated(error: RuntimeError) -> RuntimeError | KernelError | DeviceError:
    """Our own sentence out of an error of the operator; anything else as it is."""
    if isinstance(error, KernelError) or _MARK not in str(error):
        return error
    sentence = str(error).split(_MARK, 1)[1].split("\n", 1)[0]
    if sentence.startswith(_DEVICE):
        return DeviceError(sentence.removeprefix(_DEVICE) + ".")
    return KernelError(sentence)


@torch.library.register_fake("expertyard::moe_experts_into")
def _fake_into(
    hidden_states: Any, topk_ids: Any, topk_weights: Any, experts: int, out: Any
) -> None:
    return None


@torch.library.register_fake("expertyard::moe_parts")
def _fake_parts(
    hidden_states: Any, topk_ids: Any, topk_weights: Any, experts: Any, lanes: Any, timeout: float,
    layer: int, fp32: bool,
) -> Tensor:  # fmt: skip
    dtype = torch.float32 if fp32 else hidden_states.dtype
    out: Tensor = hidden_states.new_empty(hidden_states.shape, dtype=dtype)
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


# A compiler traces the backward pass together with the forward pass, run or not. So the
# complaint is an op of its own, which is traced like any other and raises when it runs.
@torch.library.custom_op("expertyard::no_backward", mutates_args=())
def _no_backward(grad: Tensor, topk_weights: Tensor) -> tuple[Tensor, Tensor]:
    raise KernelError(
        "expertyard::moe_experts has no gradient: its experts are for inference. To train, use "
        "another experts implementation, e.g. model.set_experts_implementation('grouped_mm')"
    )


@_no_backward.register_fake
def _no_backward_fake(grad: Tensor, topk_weights: Tensor) -> tuple[Tensor, Tensor]:
    return torch.empty_like(grad), torch.empty_like(topk_weights)


def _remember_weights(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(inputs[2])


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    hidden_states, topk_weights = _no_backward(grad, *ctx.saved_tensors)
    return hidden_states, None, topk_weights, None


def refuse_backward(op: Any) -> None:
    """Gives an op with moe_experts' arguments a backward that raises KernelError when it runs."""
    torch.library.register_autograd(op, _backward, setup_context=_remember_weights)


refuse_backward("expertyard::moe_experts")
