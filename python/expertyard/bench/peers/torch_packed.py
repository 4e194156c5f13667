# SPDX-License-Identifier: Apache-2.0
"""The best linears that torch itself packs weights for, in a loop over experts: oneDNN's bf16,
quantised dynamic int8 (oneDNN or FBGEMM), and the int8 and int4 weight-only products.
"""

import warnings
from collections.abc import Callable

import torch
from torch import Tensor

from ..layer import Layer
from .base import Linear, Peer, Run, by_expert

_GROUP = 128  # of int4


def _linears(
    layer: Layer, pack: Callable[[Tensor], Callable[[Tensor], Tensor]]
) -> tuple[Linear, Linear]:
    """pack(bf16 weight [out, in]) -> linear, for each expert's gate and up together, and down."""
    pairs = []
    for index in range(layer.shape.num_experts):
        one = layer.expert(index)
        pairs.append((pack(torch.cat((one.gate, one.up))), pack(one.down)))
    return (lambda e, x: pairs[e][0](x)), (lambda e, x: pairs[e][1](x))


def _onednn(layer: Layer, base: str, threads: int) -> Run:
    def pack(weight: Tensor) -> Callable[[Tensor], Tensor]:
        packed = torch.ops.mkldnn._reorder_linear_weight(weight, None)
        return lambda x: torch.ops.mkldnn._linear_pointwise(x, packed, None, "none", [], "")

    return by_expert(layer, *_linears(layer, pack), dtype=torch.bfloat16)


def _linear_dynamic(layer: Layer, base: str, threads: int) -> Run:
    def pack(weight: Tensor) -> Callable[[Tensor], Tensor]:
        rows = weight.float()
        scales = rows.abs().amax(1).clamp(min=1e-12) / 127
        zeros = torch.zeros(len(rows), dtype=torch.int64)
        quantized = torch.quantize_per_channel(rows, scales.double(), zeros, 0, torch.qint8)
        packed = torch.ops.quantized.linear_prepack(quantized, None)
        return lambda x: torch.ops.quantized.linear_dynamic(x, packed, False)

    warnings.filterwarnings("ignore", "torch.quantize_per_tensor", UserWarning)
    engines = torch.backends.quantized.supported_engines
    if "onednn" in engines:
        torch.backends.quantized.engine = "onednn"
    return by_expert(layer, *_linears(layer, pack), dtype=torch.float32)


def _int8pack(layer: Layer, base: str, threads: int) -> Run:
    def pack(weight: Tensor) -> Callable[[Tensor], Tensor]:
        rows = weight.float()
        scales = rows.abs().amax(1, keepdim=True).clamp(min=1e-12) / 127
        codes = (rows / scales).round().to(torch.int8)
        kept = scales.flatten().bfloat16()
        return lambda x: torch._weight_int8pack_mm(x, codes, kept)

    return by_expert(layer, *_linears(layer, pack), dtype=torch.bfloat16)


def _int4pack(layer: Layer, base: str, threads: int) -> Run:
    def pack(weight: Tensor) -> Callable[[Tensor], Tensor]:
        groups = weight.float().unflatten(1, (-1, _GROUP))
        scales = groups.abs().amax(2, keepdim=True).clamp(min=1e-12) / 7
        codes = ((groups / scales).round().clamp(-8, 7) + 8).to(torch.int32).flatten(1)
        packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes, 2)
        pairs = torch.cat((scales, torch.zeros_like(scales)), 2).transpose(0, 1)
        kept = pairs.contiguous().bfloat16()
        product = torch.ops.aten._weight_int4pack_mm_for_cpu
        return lambda x: product(x, packed, _GROUP, kept)

    shape = layer.shape
    if shape.hidden_size % _GROUP or shape.intermediate_size % _GROUP:
        raise ValueError(f"takes whole groups of {_GROUP} only")
    return by_expert(layer, *_linears(layer, pack), dtype=torch.bfloat16)


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
