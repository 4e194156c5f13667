# SPDX-License-Identifier: Apache-2.0
"""On a real GPU (else skipped): the op agrees with float64, runs in CUDA graphs and under
torch.compile, obeys streams, and reports ids that name no expert."""

from typing import Any

import pytest
import torch
from torch import Tensor

import expertyard as ey
from expertyard.errors import KernelError
from expertyard.native import _C
from expertyard.reference import moe_experts_reference

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]

E, H, INNER = 8, 128, 96
ROUNDING = {torch.float32: 2e-6, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}


def make(
    tokens: int, top_k: int, dtype: torch.dtype, hidden: int = H, inner: int = INNER, **options: Any
) -> tuple[Tensor, Tensor, Tensor, dict[str, Any]]:
    g = torch.Generator(device="cuda").manual_seed(tokens * 100 + top_k)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=g, device="cuda")

    weights: dict[str, Any] = {
        "gate_up": (normal(E, 2 * inner, hidden) / hidden**0.5).to(dtype),
        "down": (normal(E, hidden, inner) / inner**0.5).to(dtype),
        **options,
    }
    if options.get("activation") == "swigluoai":
        weights["gate_up_bias"], weights["down_bias"] = normal(E, 2 * inner), normal(E, hidden)
    ids = torch.randint(-1, E + 1, (tokens, top_k), generator=g, device="cuda")
    return normal(tokens, hidden).to(dtype), ids, torch.rand_like(ids, dtype=torch.float), weights


def assert_right(out: Tensor, x: Tensor, ids: Tensor, w: Tensor, weights: dict[str, Any]) -> None:
    expected = moe_experts_reference(x, ids, w, **weights)
    assert out.dtype == x.dtype and out.shape == x.shape
    # h may be rounded to the weights' dtype between the two products, the result always is
    allowed = ROUNDING[x.dtype] * (expected.abs() + 6 * expected.abs().mean()) + 1e-6
    worst = ((out.double() - expected).abs() / allowed).max() if out.numel() else torch.zeros(())
    assert worst <= 1, f"{worst:.2f} times what is allowed"


@pytest.mark.parametrize("tokens", (0, 1, 2, 7, 64, 300))
@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16, torch.float32), ids=str)
@pytest.mark.parametrize("activation", ("silu", "gelu_tanh", "swigluoai"))
def test_agrees_with_float64(tokens: int, dtype: torch.dtype, activation: str) -> None:
    x, ids, w, weights = make(tokens, 3, dtype, activation=activation)
    experts = ey.PackedExperts.from_tensors(**weights)
    for id_type in (torch.int32, torch.int64):
        assert_right(ey.moe_experts(x, ids.to(id_type), w, experts), x, ids, w, weights)
    assert experts.calls == 2
    assert experts.last_kernel == experts.kernel_name(tokens, dtype, top_k=3)


@pytest.mark.parametrize(("hidden", "inner"), ((1, 1), (37, 29), (2880, 64), (5000, 8), (64, 1408)))
@pytest.mark.parametrize("interleaved", (False, True))
def test_any_size(hidden: int, inner: int, interleaved: bool) -> None:
    for tokens in (2, 40):
        x, ids, w, weights = make(tokens, 8, torch.bfloat16, hidden, inner, interleaved=interleaved)
        out = ey.moe_experts(x, ids, w, ey.PackedExperts.from_tensors(**weights))
        assert_right(out, x, ids, w, weights)


def test_a_large_call_goes_in_chunks() -> None:
    x, ids, w, weights = make(9000, 8, torch.bfloat16, 256, 768)
    out = ey.moe_experts(x, ids, w, ey.PackedExperts.from_tensors(**weights))
    assert_right(out, x, ids, w, weights)


def test_replays_in_a_cuda_graph_with_new_inputs() -> None:
    for tokens in (1, 40):
        x, ids, w, weights = make(tokens, 2, torch.bfloat16)
        experts = ey.PackedExperts.from_tensors(**weights)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = ey.moe_experts(x, ids, w, experts)
        for seed in range(3):
            torch.manual_seed(seed)
            x.normal_()
            ids.random_(-1, E + 1)
            w.uniform_()
            graph.replay()
            assert_right(out, x, ids, w, weights)


def test_runs_on_the_current_stream() -> None:
    x, ids, w, weights = make(16, 2, torch.bfloat16)
    experts = ey.PackedExperts.from_tensors(**weights)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        torch.cuda._sleep(50_000_000)  # what follows must wait for it
        x.normal_()
        out = ey.moe_experts(x, ids, w, experts)
    side.synchronize()
    assert_right(out, x, ids, w, weights)


def test_two_runs_agree_to_the_bit() -> None:
    for tokens in (1, 64, 700):
        x, ids, w, weights = make(tokens, 4, torch.bfloat16)
        experts = ey.PackedExperts.from_tensors(**weights)
        first = ey.moe_experts(x, ids, w, experts)
        for _ in range(5):
            assert torch.equal(ey.moe_experts(x, ids, w, experts), first)


def test_compiles_without_graph_breaks() -> None:
    x, ids, w, weights = make(5, 2, torch.bfloat16)
    experts = ey.PackedExperts.from_tensors(**weights)

    @torch.compile(fullgraph=True)
    def layer(x: Tensor) -> Tensor:
        return torch.ops.expertyard.moe_experts(x * 1, ids, w, experts.handle) + 0

    assert_right(layer(x), x, ids, w, weights)


@pytest.mark.parametrize("bad", (-2, E + 1, 2**40))
def test_an_id_that_names_no_expert_is_reported_by_the_next_call(bad: int) -> None:
    for tokens in (4, 64):
        x, ids, w, weights = make(tokens, 2, torch.bfloat16)
        experts = ey.PackedExperts.from_tensors(**weights)
        good = ids.clone()
        ids[1, 1] = bad
        out = ey.moe_experts(x, ids, w, experts)
        torch.cuda.synchronize()
        assert out[1].isnan().all()
        keep = torch.arange(tokens, device="cuda") != 1
        assert not out[keep].isnan().any()
        with pytest.raises(KernelError, match=f"expected -1 to {E} .* at token 1"):
            ey.moe_experts(x, good, w, experts)
        experts.check()  # reported once
        assert_right(ey.moe_experts(x, good, w, experts), x, good, w, weights)
        ey.moe_experts(x, ids, w, experts)
        torch.cuda.synchronize()
        with pytest.raises(KernelError, match="at token 1"):
            experts.check()


def test_absent_experts_are_left_out() -> None:
    x, ids, w, weights = make(64, 2, torch.bfloat16)
    gate_up, down = weights["gate_up"], weights["down"]
    here = [e % 3 != 0 for e in range(E)]
    experts = ey.PackedExperts.from_experts(
        gate=[gate_up[e, :INNER] if here[e] else None for e in range(E)],
        up=[gate_up[e, INNER:] if here[e] else None for e in range(E)],
        down=[down[e] if here[e] else None for e in range(E)],
    )
    inside = (ids >= 0) & (ids < E)
    masked = torch.where(inside & (ids % 3 != 0), ids, -1)
    assert_right(ey.moe_experts(x, ids, w, experts), x, masked, w, weights)


def test_experts_and_tokens_on_different_devices_are_refused() -> None:
    x, ids, w, weights = make(4, 2, torch.bfloat16)
    experts = ey.PackedExperts.from_tensors(**weights)
    with pytest.raises(KernelError, match="expected device cuda:0, where these experts are"):
        ey.moe_experts(x.cpu(), ids.cpu(), w.cpu(), experts)
    on_cpu = {k: v.cpu() if isinstance(v, Tensor) else v for k, v in weights.items()}
    with pytest.raises(KernelError, match="expected device cpu, where these experts are"):
        ey.moe_experts(x, ids, w, ey.PackedExperts.from_tensors(**on_cpu))


def test_experts_can_be_dropped_while_a_graph_is_captured() -> None:
    x, ids, w, weights = make(4, 2, torch.bfloat16)
    experts = ey.PackedExperts.from_tensors(**weights)
    others = [ey.PackedExperts.from_tensors(**weights)]
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = ey.moe_experts(x, ids, w, experts)
        others.clear()
    graph.replay()
    assert_right(out, x, ids, w, weights)


def test_status_names_the_devices() -> None:
    status = _C.cuda_status()
    assert len(status["devices"]) == torch.cuda.device_count()
    assert status["devices"][0]["name"] == torch.cuda.get_device_name(0)
