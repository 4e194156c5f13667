# SPDX-License-Identifier: Apache-2.0
"""Layers that mix tokens without attention: gated delta nets, Kimi's delta attention, Mamba.

A family names its kind; modules and shapes come from the config's sizes, as in transformers 5.23.
Such a layer keeps a state of fixed size for each sequence instead of a KV cache.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from expertyard.spec.model import Shape

if TYPE_CHECKING:
    from expertyard.spec.arch import Reader

Child = tuple[str, str, tuple[Shape, ...]]  # name, class (a leading "~": the family's), shapes


@dataclass(frozen=True)
class Mixer:
    """The module that stands in for attention. `state` is what it keeps, in elements a sequence."""

    name: str
    class_suffix: str
    shapes: tuple[Shape, ...]
    children: tuple[Child, ...]
    state: int


def read_mixer(kind: str, read: Reader, hidden: int) -> Mixer:
    """The mixer of that kind in a config. Raises SpecError for sizes that are missing."""
    return _KINDS[kind](read, hidden)


def _linear(name: str, out_size: int, in_size: int) -> Child:
    return name, "Linear", ((out_size, in_size),)


def _conv(width: int, kernel: int, bias: bool = False) -> Child:
    shapes: tuple[Shape, ...] = ((width, 1, kernel),)
    return "conv1d", "Conv1d", (*shapes, (width,)) if bias else shapes


def _delta_net(read: Reader, hidden: int, split: bool) -> Mixer:
    """Qwen3-Next's gated delta net; `split`: Qwen3.5's, with its projections one by one."""
    keys, values = read.number("linear_num_key_heads"), read.number("linear_num_value_heads")
    key_dim, value_dim = read.number("linear_key_head_dim"), read.number("linear_value_head_dim")
    kernel = read.number("linear_conv_kernel_dim")
    key, value = keys * key_dim, values * value_dim
    mixed = 2 * key + value
    into = (
        (_linear("in_proj_qkv", mixed, hidden), _linear("in_proj_z", value, hidden),
         _linear("in_proj_b", values, hidden), _linear("in_proj_a", values, hidden))
        if split
        else (_linear("in_proj_qkvz", mixed + value, hidden),
              _linear("in_proj_ba", 2 * values, hidden))
    )  # fmt: skip
    children = (
        _conv(mixed, kernel),
        *into,
        ("norm", "~RMSNormGated", ((value_dim,),)),
        _linear("out_proj", hidden, value),
    )
    state = values * key_dim * value_dim + mixed * kernel
    return Mixer("linear_attn", "GatedDeltaNet", ((values,), (values,)), children, state)


def _kimi_delta(read: Reader, hidden: int) -> Mixer:
    """Kimi-Linear's delta attention, which is called self_attn too."""
    nested = read.nested("linear_attn_config")
    heads = nested.number("linear_num_heads", "num_heads")
    dim = nested.number("linear_head_dim", "head_dim")
    kernel = nested.number("linear_conv_kernel_dim", "short_conv_kernel_size")
    size = heads * dim
    children = (
        *(_linear(f"{name}_proj", size, hidden) for name in "qkv"),
        _conv(3 * size, kernel),
        ("forget_gate", "~ForgetGate", ((size,), (1, 1, heads, 1))),
        _linear("forget_gate.f_a_proj", dim, hidden),
        _linear("forget_gate.f_b_proj", size, dim),
        _linear("b_proj", heads, hidden),
        _linear("g_a_proj", dim, hidden),
        _linear("g_b_proj", size, dim),
        ("o_norm", "~RMSNormGated", ((dim,),)),
        _linear("o_proj", hidden, size),
    )
    return Mixer("self_attn", "DeltaAttention", (), children, size * dim + 3 * size * kernel)


def _mamba(read: Reader, hidden: int) -> Mixer:
    """Jamba's Mamba 1."""
    inner = read.number("mamba_expand") * hidden
    states, rank = read.number("mamba_d_state"), read.number("mamba_dt_rank")
    kernel = read.number("mamba_d_conv")
    children = (
        _conv(inner, kernel, bias=read.flag("mamba_conv_bias", True)),
        _linear("in_proj", 2 * inner, hidden),
        _linear("x_proj", rank + 2 * states, inner),
        ("dt_proj", "Linear", ((inner, rank), (inner,))),
        _linear("out_proj", hidden, inner),
        ("dt_layernorm", "~RMSNorm", ((rank,),)),
        ("b_layernorm", "~RMSNorm", ((states,),)),
        ("c_layernorm", "~RMSNorm", ((states,),)),
    )
    state = inner * (states + kernel)
    return Mixer("mamba", "MambaMixer", ((inner, states), (inner,)), children, state)


def _mamba2(read: Reader, hidden: int) -> Mixer:
    """Granite's Mamba 2."""
    inner = read.number("mamba_expand") * hidden
    heads, groups = read.number("mamba_n_heads"), read.number("mamba_n_groups")
    states, kernel = read.number("mamba_d_state"), read.number("mamba_d_conv")
    mixed = inner + 2 * groups * states
    children = (
        _conv(mixed, kernel, bias=read.flag("mamba_conv_bias", True)),
        _linear("in_proj", inner + mixed + heads, hidden),
        ("norm", "~RMSNormGated", ((inner,),)),
        _linear("out_proj", hidden, inner),
    )
    state = inner * states + mixed * kernel
    return Mixer("mamba", "MambaLayer", ((heads,),) * 3, children, state)


_KINDS: dict[str, Callable[[Reader, int], Mixer]] = {
    "delta net": lambda read, hidden: _delta_net(read, hidden, split=False),
    "split delta net": lambda read, hidden: _delta_net(read, hidden, split=True),
    "kimi delta": _kimi_delta,
    "mamba": _mamba,
    "mamba2": _mamba2,
}
