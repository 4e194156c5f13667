# SPDX-License-Identifier: Apache-2.0
"""The function behind `experts_implementation="expertyard"` and attach(), eager and compiled.

Eager calls go straight to the op. A compiled graph cannot hold a handle to packed experts, since
the parameters they point to may move after compilation; it holds the module's key instead, in an op
of its own that looks at the parameters again at every run.
"""

import torch
from torch import Tensor, nn

from ..ops import refuse_backward
from .binding import Binding, bind, binding_of, bound_module
from .outside import call, is_special

__all__ = ["experts_forward"]


def experts_forward(
    self: nn.Module,
    hidden_states: Tensor,
    top_k_index: Tensor | None = None,
    top_k_weights: Tensor | None = None,
) -> Tensor:
    """transformers' experts function: the weighted sum of each token's experts.

    hidden_states [num_tokens, hidden_size], top_k_index [num_tokens, top_k] int64,
    top_k_weights [num_tokens, top_k] in float32 or the dtype of hidden_states; modules that are
    called in ways of their own (outside.py) have other arguments.
    Raises KernelError if what the module computes is not recognised.
    """

    def run(hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        if torch.compiler.is_compiling():
            key: int = _key(self)
            out: Tensor = _moe_experts_of(hidden_states, top_k_index, top_k_weights, key)
            return out
        return _bound(self).experts()(hidden_states, top_k_index, top_k_weights)

    if not is_special(self):
        assert top_k_index is not None and top_k_weights is not None
        return run(hidden_states, top_k_index, top_k_weights)
    return call(self, _num_experts(self), run, hidden_states, top_k_index, top_k_weights)


def _bound(module: nn.Module) -> Binding:
    return binding_of(module) or bind(module)


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _key(module: nn.Module) -> int:
    # Runs while tracing, with the real module.
    binding = _bound(module)
    binding.experts()  # parameters are laid out now, before a graph has seen their strides
    return binding.key


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _num_experts(module: nn.Module) -> int:
    return _bound(module).layout.num_experts


@torch.library.custom_op("expertyard::moe_experts_of", mutates_args=())
def _moe_experts_of(
    hidden_states: Tensor, topk_ids: Tensor, topk_weights: Tensor, module_key: int
) -> Tensor:
    experts = _bound(bound_module(module_key)).experts()
    return experts.run(hidden_states, topk_ids, topk_weights)


@_moe_experts_of.register_fake
def _(hidden_states: Tensor, topk_ids: Tensor, topk_weights: Tensor, module_key: int) -> Tensor:
    return torch.empty_like(hidden_states, memory_format=torch.contiguous_format)


refuse_backward(_moe_experts_of)
