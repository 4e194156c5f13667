# SPDX-License-Identifier: Apache-2.0
"""Experts that are called, or kept, in ways of their own, and whose arithmetic is ours all the
same. Each kind says how a call of its module becomes one of run(hidden_states, topk_ids,
topk_weights), and what its parameters are named.

Llama-4 weights the INPUT of an expert: y[t] = sum_e FFN_e(s[t, e] * x[t]), s = sigmoid of the
chosen scores and 0 elsewhere. Its module gets num_experts * num_tokens rows, weighted
already, expert by expert. FFN(0) = 0, so rows of zeros are "none" and only the chosen ones are
computed.
LongCat-Flash has experts that return their input: ids from num_experts on.
JetMoE's module has the router inside, and adds a bias to what its experts give together.
DBRX keeps all experts' rows in one matrix, [num_experts * intermediate_size, hidden_size].
Muse Spark normalises each expert's output before it is weighted: every (token, expert) is a token
of its own to the op, with one expert and weight 1.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import KernelError
from ..loading import ExpertsLayout
from .module import ExpertyardExperts
from .probe import probe_gate

__all__ = ["call", "is_outside", "is_special", "outside_layout", "replacement"]

Run = Callable[[Tensor, Tensor, Tensor], Tensor]
# (module, number of experts, run, *arguments of the module's forward)
Call = Callable[..., Tensor]


def _plain(module: Any, num_experts: int, run: Run, *arguments: Tensor) -> Tensor:
    return run(*arguments)


def _llama4(module: Any, num_experts: int, run: Run, hidden_states: Tensor) -> Tensor:
    """hidden_states [num_experts * num_tokens, hidden_size], weighted."""
    rows = hidden_states.view(-1, hidden_states.shape[-1])
    tokens = rows.shape[0] // num_experts
    ids = torch.arange(num_experts, device=rows.device).repeat_interleave(tokens)
    ids = torch.where((rows != 0).any(dim=-1), ids, -1)[:, None]
    return run(rows, ids, torch.ones_like(ids, dtype=torch.float32))


def _longcat(
    module: Any, num_experts: int, run: Run, hidden: Tensor, ids: Tensor, weights: Tensor
) -> Tensor:
    same = ids >= num_experts
    routed = run(hidden, ids.masked_fill(same, -1), weights)
    share = weights.masked_fill(~same, 0).sum(-1, keepdim=True)
    return routed + (hidden * share).to(hidden.dtype)


def _dbrx(
    module: Any, num_experts: int, run: Run, hidden: Tensor, ids: Tensor, weights: Tensor
) -> Tensor:
    """hidden [batch, length, hidden_size]."""
    return run(hidden.reshape(-1, hidden.shape[-1]), ids, weights).view(hidden.shape)


def _jetmoe(module: Any, num_experts: int, run: Run, hidden_states: Tensor) -> Tensor:
    """hidden_states [batch, length, hidden_size]."""
    rows = hidden_states.reshape(-1, hidden_states.shape[-1])
    logits = module.router(rows)[-1]  # a call of the router: transformers may record what it gives
    best, ids = logits.topk(module.router.top_k, dim=1)
    weights = torch.softmax(best, dim=1).type_as(rows)
    out: Tensor = run(rows, ids, weights).view(hidden_states.shape) + module.bias
    return out


def _normed(
    module: Any, num_experts: int, run: Run, hidden: Tensor, ids: Tensor, weights: Tensor
) -> Tensor:
    top_k = ids.shape[1]
    ones = torch.ones(ids.numel(), 1, dtype=torch.float32, device=ids.device)
    each = run(hidden.repeat_interleave(top_k, 0), ids.reshape(-1, 1), ones)
    weighted: Tensor = module.post_expert_norm(each) * weights.reshape(-1, 1)
    return weighted.view(-1, top_k, hidden.shape[-1]).sum(1).to(hidden.dtype)


@dataclass(frozen=True)
class Kind:
    """call        as above
    routes      the arguments are not (hidden_states, top_k_index, top_k_weights)
    keeps       what else the module holds, which stays with transformers
    names       our parameters and what the module calls them, where that is something else
    flat        all experts' rows in one matrix, down's transposed: [num_experts * I, H] each
    transposed  as is_transposed of the interface
    """

    call: Call = _plain
    routes: bool = False
    keeps: tuple[str, ...] = ()
    names: tuple[tuple[str, tuple[str, ...]], ...] = ()
    flat: bool = False
    transposed: bool = False


# transformers' class -> what it is
_KINDS = {
    "Llama4TextExperts": Kind(_llama4, routes=True, transposed=True),
    "LongcatFlashExperts": Kind(_longcat),
    "Step3p7Experts": Kind(),
    "DbrxExperts": Kind(
        _dbrx,
        names=(("gate_up_proj", ("mlp.w1", "mlp.v1")), ("down_proj", ("mlp.w2",))),
        flat=True,
    ),
    "JetMoeMoE": Kind(
        _jetmoe,
        routes=True,
        keeps=("router", "bias"),
        names=(
            ("gate_up_proj", ("input_linear.weight",)),
            ("down_proj", ("output_linear.weight",)),
        ),
    ),
}
_INTERFACE = Kind()
_NORMED = Kind(_normed, keeps=("post_expert_norm",))


def _kind_of(module: nn.Module) -> Kind:
    found = _KINDS.get(type(module).__name__)
    if found is not None:
        return found
    return _NORMED if getattr(module, "has_post_expert_norm", False) else _INTERFACE


def is_outside(module: nn.Module) -> bool:
    """Whether the module is one of the classes above, with weights."""
    kind = _KINDS.get(type(module).__name__)
    if kind is None:
        return False
    names = dict(kind.names)
    parameters = dict(module.named_parameters())
    return all(
        name in parameters
        for ours in ("gate_up_proj", "down_proj")
        for name in names.get(ours, (ours,))
    )


def is_special(module: nn.Module) -> bool:
    """Whether a call of the module is another one than run(hidden_states, ids, weights)."""
    return _kind_of(module).call is not _plain


def call(
    module: nn.Module, num_experts: int, run: Run, *arguments: Tensor | None, kind: Any = None
) -> Tensor:
    """What the module's forward gives for these arguments, by way of run(). Any module takes
    (hidden_states, top_k_index, top_k_weights) besides, as verify() calls it."""
    kind = kind or _kind_of(module)
    given = [argument for argument in arguments if argument is not None]
    if kind.routes and len(given) == 3:
        return run(*given)
    found: Tensor = kind.call(module, num_experts, run, *given)
    return found


def outside_layout(module: Any, who: str) -> ExpertsLayout:
    """KernelError if the module computes or keeps something else than its class is known for."""
    kind = _kind_of(module)
    shapes = {name: tuple(parameter.shape) for name, parameter in module.named_parameters()}
    names = dict(kind.names)
    joined = names.get("gate_up_proj", ("gate_up_proj",))
    shape = shapes[names.get("down_proj", ("down_proj",))[0]]
    if kind.flat:
        experts, outer = int(module.num_experts), shape[1]
        inner = shape[0] // experts
    else:
        experts, outer, inner = shape
        if kind.transposed:
            outer, inner = inner, outer
    activation, alpha, limit = probe_gate(module, who, interleaved=False, apply=_gate_of(module))
    layout = ExpertsLayout(
        num_experts=experts,
        hidden_size=outer,
        intermediate_size=inner,
        activation=activation,
        alpha=alpha,
        limit=limit,
        transposed=kind.transposed,
        flat=kind.flat,
        spare=0 if kind.flat else shapes[joined[0]][0] - experts,
        names=kind.names,
    )
    for name, expected in layout.parameter_shapes().items():
        rows = 1 if name in joined and not kind.flat else 0  # LongCat has spare rows
        if shapes.get(name, ())[rows:] != expected[rows:]:
            raise KernelError(
                f"{who}: expected {name} of shape {list(expected)}, got {list(shapes[name])}."
            )
    return layout


def _gate_of(module: Any) -> Callable[[Tensor], Tensor]:
    """What the module makes of gate and up side by side."""
    if hasattr(module, "_apply_gate"):
        return module._apply_gate  # type: ignore[no-any-return]
    owner = getattr(module, "mlp", module)
    names = ("act_fn", "activation_fn", "activation")
    act = next(getattr(owner, name) for name in names if hasattr(owner, name))

    def apply(joined: Tensor) -> Tensor:
        gate, up = joined.chunk(2, dim=-1)
        found: Tensor = act(gate) * up
        return found

    return apply


class _Special(ExpertyardExperts):
    """An experts module that is called in a way of its own, or keeps a part of what was there."""

    def __init__(self, module: nn.Module, layout: ExpertsLayout, config: Any) -> None:
        super().__init__(layout, config)
        self.kind = _kind_of(module)
        for name in self.kind.keeps:
            setattr(self, name, getattr(module, name))

    def forward(  # type: ignore[override]
        self,
        hidden_states: Tensor,
        top_k_index: Tensor | None = None,
        top_k_weights: Tensor | None = None,
    ) -> Tensor:
        arguments = (hidden_states, top_k_index, top_k_weights)
        return call(self, self.num_experts, super().forward, *arguments, kind=self.kind)


def replacement(module: nn.Module, layout: ExpertsLayout, config: Any) -> ExpertyardExperts:
    """The module without experts' weights that takes the place of an experts module."""
    if _kind_of(module) == _INTERFACE:
        return ExpertyardExperts(layout, config)
    return _Special(module, layout, config)
