# SPDX-License-Identifier: Apache-2.0
"""The function behind `experts_implementation="expertyard"` and attach(), eager and compiled.

Eager calls go straight to the op. A compiled graph cannot hold a handle to packed experts, since
the parameters they point to may move after compilation; it holds the module's key instead, in an op
of its own that looks at the parameters again at every run.
"""

from typing import Any

import torch
from torch import Tensor, nn

from ..errors import KernelError
from .binding import Binding, bind, binding_of, bound_module
from .module import run

__all__ = ["experts_forward"]


def experts_forward(
    self: nn.Module, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor
) -> Tensor:
    """transformers' experts function: the weighted sum of each token's experts.

    hidden_states [num_tokens, hidden_size], top_k_index [num_tokens, top_k] int64,
    top_k_weights [num_tokens, top_k] in float32 or the dtype of hidden_states.
    Raises KernelError if what the module computes is not recognised.
    """
    if torch.compiler.is_compiling():
        key = _key(self)
        return _moe_experts_of(hidden_states, top_k_index, top_k_weights, key)
    return run(_bound(self).packed(), hidden_states, top_k_index, top_k_weights)


def _bound(module: nn.Module) -> Binding:
    return binding_of(module) or bind(module)


@torch.compiler.assume_constant_result  # runs while tracing, with the real module
def _key(module: nn.Module) -> int:
    binding = _bound(module)
    binding.packed()  # parameters are laid out now, before a graph has seen their strides
    return binding.key


@torch.library.custom_op("expertyard::moe_experts_of", mutates_args=())
def _moe_experts_of(
    hidden_states: Tensor, topk_ids: Tensor, topk_weights: Tensor, module_key: int
) -> Tensor:
    return run(_bound(bound_module(module_key)).packed(), hidden_states, topk_ids, topk_weights)


@_moe_experts_of.register_fake
def _(hidden_states: Tensor, topk_ids: Tensor, topk_weights: Tensor, module_key: int) -> Tensor:
    return torch.empty_like(hidden_states, memory_format=torch.contiguous_format)


# A compiler traces the backward pass together with the forward pass, even if it is never run. So
# the complaint is an op of its own: it is traced like any other and raises when it runs.
@torch.library.custom_op("expertyard::no_backward", mutates_args=())
def _no_backward(gradient: Tensor) -> Tensor:
    raise KernelError(
        "expertyard::moe_experts has no backward: its kernels are for inference. Train with "
        'experts_implementation="grouped_mm", or call expertyard.detach(model) first.'
    )


@_no_backward.register_fake
def _(gradient: Tensor) -> Tensor:
    return torch.empty_like(gradient)


def _remember_shapes(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.top_k_weights_like = inputs[2].shape, inputs[2].dtype


def _backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
    gradient = _no_backward(gradient)
    shape, dtype = ctx.top_k_weights_like
    return gradient, None, gradient.new_zeros(shape, dtype=dtype), None


_moe_experts_of.register_autograd(_backward, setup_context=_remember_shapes)
