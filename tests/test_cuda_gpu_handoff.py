# SPDX-License-Identifier: Apache-2.0
"""On a real GPU (else skipped): a layer in parts on the GPU and the CPU, in CUDA graphs and outside
them; errors and time-outs of the CPU's part surface as sentences."""

from typing import Any

import pytest
import torch
from torch import Tensor

import expertyard as ey
from expertyard.dispatch import (
    LayerExperts,
    PartPlan,
    Placement,
    Prefill,
    RunOptions,
    spread,
    streaming,
)
from expertyard.errors import DeviceError, KernelError
from expertyard.reference import moe_experts_reference

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]

E, H, INNER, TOP_K = 8, 256, 96, 3
SPLIT = {"cuda:0": (0, 2, 5), "cpu": (1, 3, 4, 6, 7)}


def weights(seed: int = 0) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(seed)
    return {
        "gate_up": (torch.randn(E, 2 * INNER, H, generator=g) / H**0.5).bfloat16(),
        "down": (torch.randn(E, H, INNER, generator=g) / INNER**0.5).bfloat16(),
    }


def layer(w: dict[str, Tensor], split: Any = SPLIT, **options: Any) -> LayerExperts:
    parts = tuple(
        PartPlan(ids, device, "bf16", device.partition(":")[0], "test")
        for device, ids in split.items()
    )
    made = spread(ey.PackedExperts.from_tensors(**w), [(p.ids, p.device) for p in parts])
    return LayerExperts(Placement("cuda:0", parts), made, layer=3, options=RunOptions(**options))


def inputs(tokens: int, ids_type: torch.dtype = torch.int64) -> tuple[Tensor, Tensor, Tensor]:
    x = torch.randn(tokens, H, device="cuda").bfloat16()
    ids = torch.randint(0, E, (tokens, TOP_K), device="cuda").to(ids_type)
    return x, ids, torch.rand(tokens, TOP_K, device="cuda")


def refill(x: Tensor, ids: Tensor, topk_weights: Tensor) -> None:
    x.normal_()
    ids.random_(0, E)
    topk_weights.uniform_()


def assert_right(out: Tensor, call: tuple[Tensor, Tensor, Tensor], w: dict[str, Tensor]) -> None:
    there = {name: t.cuda() for name, t in w.items()}
    expected = moe_experts_reference(*call, **there)
    allowed = 2.0**-8 * (expected.abs() + 6 * expected.abs().mean()) + 1e-6
    assert ((out.double() - expected).abs() / allowed).max() <= 1


@pytest.mark.parametrize("handoff", ["auto", "flag", "host"])
@pytest.mark.parametrize("split", [SPLIT, {"cpu": tuple(range(8))}], ids=["two parts", "CPU only"])
@pytest.mark.parametrize("tokens", [1, 7, 30])
def test_outside_graphs(handoff: str, split: Any, tokens: int) -> None:
    w = weights()
    experts = layer(w, split, handoff=handoff)
    for ids_type in (torch.int32, torch.int64):
        call = inputs(tokens, ids_type)
        with torch.inference_mode():
            assert_right(experts(*call), call, w)
    experts.check()


@pytest.mark.parametrize("handoff", ["auto", "host"])
@pytest.mark.parametrize("tokens", [1, 16])
def test_a_hundred_replays(handoff: str, tokens: int) -> None:
    """Two layers in one graph, that share their buffers."""
    first, second = weights(0), weights(1)
    a, b = layer(first, handoff=handoff), layer(second, handoff=handoff)
    b.desks = a.desks
    x, ids, topk_weights = inputs(tokens)
    with torch.inference_mode():
        a(x, ids, topk_weights)  # warm up
        b(x, ids, topk_weights)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            middle = a(x, ids, topk_weights)
            out = b(middle, ids, topk_weights)
        for _ in range(100):
            refill(x, ids, topk_weights)
            graph.replay()
            torch.cuda.synchronize()
            assert_right(middle, (x, ids, topk_weights), first)
            assert_right(out, (middle, ids, topk_weights), second)
    a.check()


def test_replays_without_a_pause_agree_to_the_bit() -> None:
    w = weights()
    experts = layer(w)
    call = inputs(4)
    with torch.inference_mode():
        experts(*call)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = experts(*call)
        graph.replay()
        torch.cuda.synchronize()
        expected = out.clone()
        for _ in range(100):
            graph.replay()
        torch.cuda.synchronize()
    assert torch.equal(out, expected)
    experts.check()


def test_a_moved_expert_is_seen_by_a_graph() -> None:
    w = weights()
    experts = layer(w)
    call = inputs(5)
    with torch.inference_mode():
        experts(*call)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = experts(*call)
        experts.move(0, "cpu")
        experts.move(7, "cuda:0")
        graph.replay()
        torch.cuda.synchronize()
    assert_right(out, call, w)


def test_a_bad_id_is_a_sentence_of_a_later_check() -> None:
    experts = layer(weights(), {"cpu": tuple(range(8))})
    x, ids, topk_weights = inputs(2)
    with torch.inference_mode():
        experts(x, ids, topk_weights)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = experts(x, ids, topk_weights)
        ids[1, 2] = 99
        graph.replay()
        torch.cuda.synchronize()
        assert out.isnan().all()
        with pytest.raises(KernelError, match=r"topk_ids\[1, 2\] is 99"):
            experts.check()
        ids[1, 2] = 3
        graph.replay()
        torch.cuda.synchronize()
    assert not out.isnan().any()
    experts.check()


def test_a_cpu_that_is_too_slow_is_a_time_out() -> None:
    """Within a microsecond nobody answers; afterwards the box is taken up again."""
    experts = layer(weights(), handoff="flag", timeout=1e-6)
    call = inputs(30)
    with torch.inference_mode():
        out = experts(*call)
        torch.cuda.synchronize()
        assert out.isnan().all()
        with pytest.raises(DeviceError, match="did not finish within 1e-06 s"):
            experts.check()


TWO = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
ON_TWO_GPUS = [
    {"cuda:0": (0, 2), "cuda:1": (1, 5), "cpu": (3, 4, 6, 7)},
    {"cuda:0": (0, 2, 3, 4), "cuda:1": (1, 5, 6, 7)},
    {"cuda:1": tuple(range(8))},
]


@TWO
@pytest.mark.parametrize("split", ON_TWO_GPUS, ids=["with the CPU", "two GPUs", "the other GPU"])
@pytest.mark.parametrize("ids_type", [torch.int32, torch.int64])
def test_replays_with_a_part_on_another_gpu(split: Any, ids_type: torch.dtype) -> None:
    """Two layers in a graph, that share their buffers."""
    first, second = weights(0), weights(1)
    a, b = layer(first, split), layer(second, split)
    b.desks = a.desks
    x, ids, topk_weights = inputs(5, ids_type)
    with torch.inference_mode():
        assert_right(
            b(a(x, ids, topk_weights), ids, topk_weights),
            (a(x, ids, topk_weights), ids, topk_weights),
            second,
        )  # outside graphs
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            middle = a(x, ids, topk_weights)
            out = b(middle, ids, topk_weights)
        for _ in range(50):
            refill(x, ids, topk_weights)
            graph.replay()
            torch.cuda.synchronize()
            assert_right(middle, (x, ids, topk_weights), first)
            assert_right(out, (middle, ids, topk_weights), second)
    a.check()


@TWO
def test_two_graphs_with_parts_on_another_gpu_may_run_at_once() -> None:
    w = weights()
    experts = layer(w, ON_TWO_GPUS[1])
    calls = [inputs(4), inputs(4)]
    graphs, outs = [], []
    with torch.inference_mode():
        experts(*calls[0])
        torch.cuda.synchronize()
        for call in calls:
            graphs.append(torch.cuda.CUDAGraph())
            with torch.cuda.graph(graphs[-1]):
                outs.append(experts(*call))
        streams = [torch.cuda.Stream(), torch.cuda.Stream()]
        for _ in range(50):
            for graph, stream in zip(graphs, streams, strict=True):
                with torch.cuda.stream(stream):
                    graph.replay()
        torch.cuda.synchronize()
    for call, out in zip(calls, outs, strict=True):
        assert_right(out, call, w)


@pytest.mark.parametrize("experts_at_once", [1, 3, 8])
def test_weights_that_are_brought_for_a_call(
    experts_at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    w = weights()
    experts = layer(w, {"cpu": tuple(range(8))})
    size = experts.parts[0].packed.expert_bytes(0)
    monkeypatch.setattr(streaming, "CHUNK_BYTES", experts_at_once * size)
    experts.parts[0].prefill = Prefill("cuda:0", "cuda", "test")
    experts.parts[0].stream_from = 8
    experts._arrange()
    for _ in range(20):
        call = inputs(64)
        with torch.inference_mode():
            out = experts(*call)
        assert_right(out, call, w)


def test_what_cannot_be_captured_is_a_sentence() -> None:
    experts = layer(weights(), prefill_tokens=1, defer=0)
    for part in experts.parts:
        part.stream_from = 1 if part.is_cpu else None
    experts._arrange()
    call = inputs(4)
    with (
        torch.inference_mode(),
        pytest.raises(DeviceError, match="cannot be in a CUDA graph"),
        torch.cuda.graph(torch.cuda.CUDAGraph()),
    ):
        experts(*call)
