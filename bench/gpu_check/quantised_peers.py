# SPDX-License-Identifier: Apache-2.0
"""Other people's kernels for quantised weights: Marlin (vLLM's fused_marlin_moe), DeepGEMM's
grouped fp8 products, Humming. Written from their public signatures, without a GPU to try them on:
so each must compute a small call right before it is timed, and is otherwise left out with the
reason.

Packing hundreds of experts would take minutes. So two are packed, and expert e is a copy of number
e % 2, in memory of its own.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from expertyard.reference import round_to_e4m3
from expertyard.testing import Problem

GROUP = 128
LARGEST_E4M3 = 448.0
Run = Callable[[Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Peer:
    """run: hidden_states, topk_ids, topk_weights -> out. gate_up, down: what its first two experts'
    weights stand for; rounding: what it does to activations before it multiplies."""

    run: Run
    gate_up: Tensor
    down: Tensor
    rounding: Callable[[Tensor], Tensor] | None = None


def _copies(two: list[Tensor], count: int) -> Tensor:
    out = two[0].new_empty((count, *two[0].shape))
    for e in range(count):
        out[e].copy_(two[e % 2])
    return out


def marlin_int4(w: Problem) -> Peer:
    """W4A16 in groups of 128, symmetric."""
    from vllm.model_executor.layers.fused_moe.fused_marlin_moe import fused_marlin_moe
    from vllm.model_executor.layers.quantization.utils.marlin_utils_test import marlin_quantize
    from vllm.scalar_type import scalar_types

    kind, experts = scalar_types.uint4b8, w.down.shape[0]
    packed, scales, kept = [], [], []
    for matrices in (w.gate_up, w.down):
        done = [marlin_quantize(matrices[e].T.contiguous(), kind, GROUP, False) for e in range(2)]
        kept.append(torch.stack([d[0].T for d in done]))
        packed.append(_copies([d[1] for d in done], experts))
        scales.append(_copies([d[2] for d in done], experts))

    def run(x: Tensor, ids: Tensor, topk_weights: Tensor) -> Tensor:
        out: Tensor = fused_marlin_moe(
            hidden_states=x, w1=packed[0], w2=packed[1], bias1=None, bias2=None,
            w1_scale=scales[0], w2_scale=scales[1], gating_output=None,
            topk_weights=topk_weights, topk_ids=ids.int(), quant_type_id=kind.id,
            global_num_experts=experts,
        )  # fmt: skip
        return out

    return Peer(run, *kept)


def _blocks_e4m3(matrix: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """[rows, cols], multiples of 128: codes, scales of 128 x 128 blocks, what they stand for."""
    rows, cols = matrix.shape
    blocks = matrix.float().view(rows // GROUP, GROUP, cols // GROUP, GROUP)
    scale = blocks.abs().amax((1, 3), keepdim=True).clamp(min=1e-10) / LARGEST_E4M3
    codes = (blocks / scale).to(torch.float8_e4m3fn)
    kept = (codes.float() * scale).view(rows, cols)
    return codes.view(rows, cols), scale[:, 0, :, 0].contiguous(), kept


def _rows_e4m3(x: Tensor) -> tuple[Tensor, Tensor]:
    groups = x.float().unflatten(1, (-1, GROUP))
    scale = groups.abs().amax(2, keepdim=True).clamp(min=1e-10) / LARGEST_E4M3
    codes = (groups / scale).to(torch.float8_e4m3fn)
    return codes.flatten(1), scale[..., 0].contiguous()


def deep_gemm_fp8(w: Problem) -> Peer:
    """Its two grouped products; the sort, the activation and the rounding between are torch's."""
    import deep_gemm

    experts, hidden, inner = w.down.shape
    if hidden % GROUP or inner % GROUP:
        raise ValueError("sizes are no multiples of 128")
    alignment = next(
        getattr(deep_gemm, name)()
        for name in (
            "get_mk_alignment_for_contiguous_layout",
            "get_m_alignment_for_contiguous_layout",
        )
        if hasattr(deep_gemm, name)
    )
    grouped = deep_gemm.m_grouped_fp8_gemm_nt_contiguous
    codes, scales, kept = [], [], []
    for matrices in (w.gate_up, w.down):
        done = [_blocks_e4m3(matrices[e]) for e in range(2)]
        codes.append(_copies([d[0] for d in done], experts))
        scales.append(_copies([d[1] for d in done], experts))
        kept.append(torch.stack([d[2] for d in done]))

    def run(x: Tensor, ids: Tensor, topk_weights: Tensor) -> Tensor:
        pairs, top_k = ids.numel(), ids.shape[1]
        flat = ids.flatten()
        order = flat.argsort(stable=True)
        counts = torch.zeros(experts, dtype=torch.int64, device=x.device)
        counts.scatter_add_(0, flat, torch.ones_like(flat))
        padded = (counts + alignment - 1) // alignment * alignment
        begins = padded.cumsum(0) - padded
        firsts = counts.cumsum(0) - counts
        chosen = flat[order]
        rows = begins[chosen] + torch.arange(pairs, device=x.device) - firsts[chosen]
        most = (pairs + min(experts, pairs) * (alignment - 1)) // alignment * alignment
        whose = torch.full((most,), -1, dtype=torch.int32, device=x.device)
        whose[rows] = chosen.int()
        tokens = x.new_zeros(most, hidden)
        tokens[rows] = x[order // top_k]
        both = x.new_empty(most, 2 * inner)
        grouped(_rows_e4m3(tokens), (codes[0], scales[0]), both, whose)
        gate, up = both.float().chunk(2, 1)
        y = x.new_empty(most, hidden)
        h = torch.nn.functional.silu(gate) * up
        # rows that are nobody's are whatever they were
        h = torch.where((whose >= 0)[:, None], h, 0)
        grouped(_rows_e4m3(h), (codes[1], scales[1]), y, whose)
        by_pair = x.new_empty(pairs, hidden)
        by_pair[order] = y[rows]
        shares = by_pair.view(-1, top_k, hidden).float() * topk_weights[..., None]
        return shares.sum(1).to(x.dtype)

    return Peer(run, *kept, rounding=round_to_e4m3)


def humming_int4(w: Problem) -> Peer:
    """Its two indexed products of int4 (groups of 128, symmetric); silu and the sum are torch's."""
    from humming import dtypes
    from humming.config import GemmType
    from humming.layer import HummingMethod
    from humming.schema.humming import HummingInputSchema, HummingWeightSchema
    from vllm.model_executor.layers.fused_moe.moe_align_block_size import moe_align_block_size

    experts = w.down.shape[0]
    kind = GemmType.INDEXED
    compute = json.dumps({"use_f16_accum": False, "gemm_type": kind.value})
    layers, tunings, kept = [], [], []
    for matrices in (w.gate_up, w.down):
        _, n, k = matrices.shape
        groups = matrices[:2].float().unflatten(2, (-1, GROUP))
        scale = (groups.abs().amax(3, keepdim=True) / 7).bfloat16()
        codes = (groups / scale.float()).round().clamp(-8, 7)
        kept.append((codes * scale.float()).flatten(2))
        places = torch.arange(0, 32, 4, device=matrices.device)
        nibbles = (codes + 8).flatten(2).long().unflatten(2, (-1, 8)) << places
        packed = nibbles.sum(3).to(torch.int32)
        layer = torch.nn.Module()
        for name, two in (("weight", packed), ("weight_scale", scale[..., 0])):
            parameter = torch.nn.Parameter(_copies([*two], experts), requires_grad=False)
            layer.register_parameter(name, parameter)
        HummingMethod.prepare_layer_meta(
            layer=layer, shape_n=n, shape_k=k, num_experts=experts, torch_dtype=torch.bfloat16,
            input_schema=HummingInputSchema(),
            weight_schema=HummingWeightSchema(
                b_dtype=dtypes.uint4, bs_dtype=dtypes.bfloat16, weight_scale_group_size=GROUP
            ),
        )  # fmt: skip
        HummingMethod.transform_humming_layer(layer)
        layers.append(layer)
        tunings.append(HummingMethod.get_default_tuning_configs(layer=layer, gemm_type=kind))

    def product(which: int, x: Tensor, ids: Tensor, top_k: int) -> Tensor:
        pairs = ids.numel()
        config = next(c for low, high, c in tunings[which] if low < pairs <= high)
        sorted_ids, expert_ids, padded = moe_align_block_size(
            ids.int(), config["block_shape"][0], experts
        )
        out = x.new_empty(pairs, kept[which].shape[1])
        HummingMethod.forward_layer(
            layer=layers[which], inputs=x, outputs=out, sorted_ids=sorted_ids,
            expert_ids=expert_ids, num_tokens_padded=padded, top_k=top_k, valid_shape_m=pairs,
            compute_config=compute, tuning_config=json.dumps(tunings[which]),
        )  # fmt: skip
        return out

    def run(x: Tensor, ids: Tensor, topk_weights: Tensor) -> Tensor:
        gate, up = product(0, x, ids, ids.shape[1]).chunk(2, 1)
        h = torch.nn.functional.silu(gate.float()) * up.float()
        y = product(1, h.to(x.dtype), ids.view(-1, 1), 1).view(*ids.shape, -1)
        return (y.float() * topk_weights[..., None]).sum(1).to(x.dtype)

    return Peer(run, *kept)


MAKERS: dict[str, Callable[[Problem], Peer]] = {
    "vllm_marlin_int4": marlin_int4,
    "deep_gemm_fp8": deep_gemm_fp8,
    "humming_int4": humming_int4,
}
BYTES_OF_A_WEIGHT: dict[str, float] = {
    "vllm_marlin_int4": 0.5 + 2 / GROUP,
    "deep_gemm_fp8": 1.0,
    "humming_int4": 0.5 + 2 / GROUP,
}


def reason_of(name: str, error: Exception) -> str:
    text = str(error).partition("\n")[0]
    if isinstance(error, ImportError):
        return f"{name}: not installed ({text})"
    return f"{name}: {type(error).__name__}: {text}"
