# SPDX-License-Identifier: Apache-2.0
"""The best linears that torch itself packs weights for, in a loop over experts: oneDNN's bf16,
quantised dynamic int8 (oneDNN or FBGEMM), and the int8 and int4 weight-only products.
"""

import warnings
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from ..layer import Layer
from .base import Parts, Peer, Run, by_expert, converted, int4_groups, int8_rows, joined

_GROUP = 128  # of int4


def _loop(
    layer: Layer,
    convert: Callable[[Tensor], Parts],
    linear: Callable[..., Callable[[Tensor], Tensor]],
    dtype: torch.dtype = torch.bfloat16,
) -> Run:
    """convert(bf16 weight) -> parts; linear(*parts) -> [tokens, in] -> [tokens, out]."""
    pairs = [
        (linear(*joined(gate, up)), linear(*down)) for gate, up, down in converted(layer, convert)
    ]
    return by_expert(layer, lambda e, x: pairs[e][0](x), lambda e, x: pairs[e][1](x), dtype)


def _onednn(layer: Layer, base: str, threads: int) -> Run:
    def linear(weight: Tensor) -> Callable[[Tensor], Tensor]:
        packed = torch.ops.mkldnn._reorder_linear_weight(weight, None)
        return lambda x: torch.ops.mkldnn._linear_pointwise(x, packed, None, "none", [], "")

    return _loop(layer, lambda weight: (weight,), linear)


def _linear_dynamic(layer: Layer, base: str, threads: int) -> Run:
    def linear(codes: Tensor, scales: Tensor) -> Callable[[Tensor], Tensor]:
        zeros = torch.zeros(len(codes), dtype=torch.int64)
        quantized = torch._make_per_channel_quantized_tensor(codes, scales.double(), zeros, 0)
        packed = torch.ops.quantized.linear_prepack(quantized, None)
        return lambda x: torch.ops.quantized.linear_dynamic(x, packed, False)

    warnings.filterwarnings("ignore", "torch.quantize_per_tensor", UserWarning)
    if "onednn" in torch.backends.quantized.supported_engines:
        torch.backends.quantized.engine = "onednn"
    return _loop(layer, int8_rows, linear, torch.float32)


def _int8pack(layer: Layer, base: str, threads: int) -> Run:
    def linear(codes: Tensor, scales: Tensor) -> Callable[[Tensor], Tensor]:
        kept = scales.bfloat16()
        return lambda x: torch._weight_int8pack_mm(x, codes, kept)

    return _loop(layer, int8_rows, linear)


def _int4pack(layer: Layer, base: str, threads: int) -> Run:
    def linear(codes: Tensor, scales: Tensor) -> Callable[[Tensor], Tensor]:
        packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes.to(torch.int32), 2)
        kept = torch.stack((scales, torch.zeros_like(scales)), 2).transpose(0, 1).contiguous()
        product = torch.ops.aten._weight_int4pack_mm_for_cpu
        return lambda x: product(x, packed, _GROUP, kept)

    shape = layer.shape
    if shape.hidden_size % _GROUP or shape.intermediate_size % _GROUP:
        raise ValueError(f"takes whole groups of {_GROUP} only")
    return _loop(layer, partial(int4_groups, group=_GROUP), linear)


_BOTH = ("silu", "swigluoai")

ONEDNN = Peer(
    name="onednn",
    about="mkldnn._linear_pointwise on prepacked bf16 weights, a loop over experts",
    beside={"bf16": "bf16"},
    make=_onednn,
    bytes_per_weight={"bf16": 2},
    activations=_BOTH,
)
LINEAR_DYNAMIC = Peer(
    name="linear_dynamic",
    about="quantized.linear_dynamic, int8 per channel, a loop over experts",
    beside={"int8": "int8"},
    make=_linear_dynamic,
    bytes_per_weight={"int8": 1},
    activations=_BOTH,
)
INT8PACK = Peer(
    name="int8pack",
    about="torch's _weight_int8pack_mm, per channel, a loop over experts",
    beside={"int8": "int8"},
    make=_int8pack,
    bytes_per_weight={"int8": 1},
    activations=_BOTH,
)
INT4PACK = Peer(
    name="int4pack",
    about="torch's _weight_int4pack_mm_for_cpu, groups of 128, a loop over experts",
    beside={"int4": "int4"},
    make=_int4pack,
    bytes_per_weight={"int4": 0.6},
    activations=_BOTH,
)
