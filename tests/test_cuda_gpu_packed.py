# SPDX-License-Identifier: Apache-2.0
"""On a real GPU (else skipped): packed experts of every format agree with float64 and, to the order
of fp32 sums, with the CPU's exact mode; graphs replay; an expert's two blobs move by a copy."""

import pytest
import torch
from torch import Tensor

import expertyard as ey
from expertyard.errors import KernelError
from expertyard.formats import get_format
from expertyard.packing import ExpertPacker
from expertyard.reference import split_gate_up
from expertyard.testing import Problem, calc_diff, random_problem

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]

FORMATS = (
    *("bf16", "fp8", "fp8-channel", "int8", "int8-g32", "mxfp4"),
    *("int4-g128", "int4-g32", "int4-g64-asym"),
)
TOLERANCE = {torch.bfloat16: 3.5e-3, torch.float16: 3.5e-3, torch.float32: 3e-3}  # h is bf16
SIZES = ((264, 72), (2880, 96), (512, 1408))


def on_cuda(p: Problem) -> ey.PackedExperts:
    num_experts, hidden_size, intermediate_size = p.down.shape
    scale_dtype = None
    if p.quantized is not None and p.quantized[0][0].scales.dtype != torch.uint8:
        scale_dtype = p.quantized[0][0].scales.dtype
    packer = ExpertPacker(
        num_experts, hidden_size, intermediate_size, p.format, device="cuda:0",
        activation=p.activation, scale_dtype=scale_dtype,
    )  # fmt: skip
    gate, up = split_gate_up(p.gate_up, p.interleaved)
    for e in range(num_experts):
        bias = {}
        if p.gate_up_bias is not None and p.down_bias is not None:
            g, u = split_gate_up(p.gate_up_bias[e], p.interleaved)
            bias = {"gate_bias": g.cuda(), "up_bias": u.cuda(), "down_bias": p.down_bias[e].cuda()}
        packer.put(e, *(p.quantized[e] if p.quantized else (gate[e], up[e], p.down[e])), **bias)
    return packer.finish()


def call(p: Problem, experts: ey.PackedExperts) -> Tensor:
    return ey.moe_experts(p.hidden_states.cuda(), p.topk_ids.cuda(), p.topk_weights.cuda(), experts)


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("tokens", (1, 3, 20, 300))
def test_agrees_with_float64_and_with_the_cpu(
    format: str, size: tuple[int, int], tokens: int
) -> None:
    p = random_problem(
        num_tokens=tokens, hidden_size=size[0], intermediate_size=size[1], num_experts=8, top_k=2,
        format=format, layout="blocks",
    )  # fmt: skip
    experts = on_cuda(p)
    out = call(p, experts)
    assert calc_diff(out.cpu(), p.reference()) < TOLERANCE[torch.bfloat16]
    # h rounds the other way here and there; the rest is the order of sums
    cpu = ey.moe_experts(p.hidden_states, p.topk_ids, p.topk_weights, p.pack())
    assert calc_diff(out.cpu(), cpu) < 2e-3
    assert experts.last_kernel == experts.kernel_name(tokens, torch.bfloat16, top_k=2)
    assert torch.equal(call(p, experts), out)


@pytest.mark.parametrize("activation", ("silu", "gelu_tanh", "swigluoai"))
@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16, torch.float32), ids=str)
@pytest.mark.parametrize("tokens", (2, 40))
def test_activations_biases_and_dtypes(activation: str, dtype: torch.dtype, tokens: int) -> None:
    p = random_problem(
        num_tokens=tokens, hidden_size=320, intermediate_size=96, num_experts=6, top_k=2,
        format="int4-g32", layout="blocks", activation=activation, bias=True, hidden_dtype=dtype,
    )  # fmt: skip
    assert calc_diff(call(p, on_cuda(p)).cpu(), p.reference()) < TOLERANCE[dtype]


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("tokens", (2, 40))
def test_small_call(format: str, tokens: int) -> None:
    """Small enough for compute-sanitizer, which gpu_check runs on these."""
    p = random_problem(
        num_tokens=tokens, hidden_size=136, intermediate_size=40, num_experts=3, top_k=2,
        format=format, layout="blocks",
    )  # fmt: skip
    assert calc_diff(call(p, on_cuda(p)).cpu(), p.reference()) < TOLERANCE[torch.bfloat16]


def test_graphs_replay_many_times_and_side_by_side() -> None:
    p = random_problem(
        num_tokens=3, hidden_size=512, intermediate_size=256, num_experts=8, top_k=2,
        format="int4-g128", layout="blocks",
    )  # fmt: skip
    experts = on_cuda(p)
    x, ids, w = p.hidden_states.cuda(), p.topk_ids.cuda(), p.topk_weights.cuda()
    graphs, outs = [], []
    for _ in range(2):
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            outs.append([ey.moe_experts(x, ids, w, experts) for _ in range(5)])
        graphs.append(graph)
    expected = call(p, experts)
    streams = [torch.cuda.Stream(), torch.cuda.Stream()]
    for _ in range(50):
        for graph, stream in zip(graphs, streams, strict=True):
            with torch.cuda.stream(stream):
                graph.replay()
    torch.cuda.synchronize()
    for out in (*outs[0], *outs[1]):
        assert torch.equal(out, expected)


def test_an_expert_moves_by_a_copy_of_its_two_blobs() -> None:
    p = random_problem(
        num_tokens=4, hidden_size=264, intermediate_size=72, num_experts=4, top_k=2,
        format="int4-g32", layout="blocks",
    )  # fmt: skip
    assert p.quantized is not None
    packers = [
        ExpertPacker(
            4, 264, 72, p.format, device=device, scale_dtype=p.quantized[0][0].scales.dtype
        )
        for device in ("cpu", "cuda:0")
    ]
    for e in range(4):
        packers[0].put(e, *p.quantized[e])
        packers[1].put(e, *p.quantized[e])
        for here, there in zip(packers[0].blobs(e), packers[1].blobs(e), strict=True):
            assert torch.equal(here, there.cpu())
    assert get_format(p.format).base == "int4"


def test_an_id_that_names_no_expert_is_reported_by_the_next_call() -> None:
    for tokens in (4, 64):
        p = random_problem(
            num_tokens=tokens, hidden_size=264, intermediate_size=72, num_experts=8, top_k=2,
            format="fp8", layout="blocks",
        )  # fmt: skip
        experts = on_cuda(p)
        p.topk_ids[1, 1] = 9
        out = call(p, experts)
        torch.cuda.synchronize()
        assert out[1].isnan().all()
        with pytest.raises(KernelError, match="at token 1"):
            experts.check()
