# SPDX-License-Identifier: Apache-2.0
"""Copies from device to device: of experts, for good (a split layer, a move), and of a call's
tensors. Experts that come for one call: streaming.py."""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from .. import virtual
from ..devices import to_device, torch_device
from ..errors import PlanError
from ..ops import moe_experts_into
from ..reference import apply_activation
from ..weights import Expert, PackedExperts

__all__ = ["bring", "copy_expert", "multiply", "spread"]


def copy_expert(
    tensors: Expert, device: str, strides: tuple[int, int, int] | None = None
) -> Expert:
    """The expert's tensors on `device`, in memory of their own.

    strides  values between rows of gate, up and down, if there they lie among experts that have
             other strides than contiguous ones
    Raises torch.OutOfMemoryError, with nothing left behind.
    """
    made: dict[int, Tensor] = {}
    for index, tensor in enumerate(tensors):
        if tensor is None or id(tensor) in made:
            continue
        stride = strides[index] if strides is not None and index < 3 else 0
        made[id(tensor)] = _copy(tensor, device, stride)
    return tuple(None if tensor is None else made[id(tensor)] for tensor in tensors)


def _copy(tensor: Tensor, device: str, row_stride: int) -> Tensor:
    target, gpu = torch_device(device), virtual.gpu(device)
    if tensor.dim() == 2 and row_stride > tensor.shape[1]:
        wide = torch.empty((tensor.shape[0], row_stride), dtype=tensor.dtype, device=target)
        copy = wide[:, : tensor.shape[1]]
    else:
        copy = torch.empty(tensor.shape, dtype=tensor.dtype, device=target)
    if gpu is not None:
        virtual.mark(gpu.own(copy), gpu)
    elif virtual.number():
        virtual.mark(copy, device)
    return copy.copy_(tensor)


def spread(
    packed: PackedExperts, parts: Sequence[tuple[Iterable[int], str]]
) -> list[PackedExperts]:
    """The experts of `packed`, in parts: (ids, device). What stays where it is, is used in place.

    Raises torch.OutOfMemoryError.
    """
    home = str(packed.device)
    found = []
    for ids, device in parts:
        experts = {}
        for expert in ids:
            tensors = packed.expert(expert)
            if tensors is None:
                raise PlanError(f"expert {expert} of {packed!r} is not here and cannot be moved.")
            stays = device == home and virtual.gpu(device) is None
            experts[expert] = tensors if stays else copy_expert(tensors, device)
        found.append(packed.holding(experts))
    return found


def multiply(
    packed: PackedExperts, op: str, hidden: Tensor, ids: Tensor, weights: Tensor
) -> Tensor:
    """What these experts add, float32, where they and all arguments are. op: "torch", or ours."""
    if op == "torch":
        return _plain(packed, hidden, ids, weights)
    out = hidden.new_empty(hidden.shape, dtype=torch.float32)
    moe_experts_into(hidden, ids, weights, packed, out)
    return out


def _plain(packed: PackedExperts, hidden: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
    """Plain PyTorch, expert by expert, in the weights' dtype; the sum in float32."""
    total = hidden.new_zeros(hidden.shape, dtype=torch.float32)
    for expert in packed.here():
        token, slot = torch.where(ids == expert)
        if token.numel() == 0:
            continue
        gate, up, down, *biases = packed.expert(expert) or ()
        assert gate is not None and up is not None and down is not None
        x = hidden[token].to(gate.dtype)
        g = (x @ gate.T).float() if gate is not up else None
        u = (x @ up.T).float()
        if biases[0] is not None and g is not None:
            g = g + biases[0]
        if biases[1] is not None:
            u = u + biases[1]
        h = apply_activation(g, u, packed.activation, packed.alpha, packed.limit)
        out = (h.to(down.dtype) @ down.T).float()
        if biases[2] is not None:
            out = out + biases[2]
        total.index_add_(0, token, out * weights[token, slot, None].float())
    return total


def bring(tensor: Tensor, device: str) -> Tensor:
    """A tensor of one call to where it is needed. Not counted: it is gone when the call is over."""
    place = virtual.marked(tensor)
    if place == device:
        return tensor
    if place is not None or virtual.number():
        return virtual.mark(tensor.clone(), device)
    return to_device(tensor, device)
