# SPDX-License-Identifier: Apache-2.0
"""Several NUMA nodes, pretended: where a block lies and who takes it changes no bit of a result."""

from collections.abc import Iterator

import pytest
import torch

from expertyard import moe_experts
from expertyard.native import _C
from expertyard.packing import ExpertPacker, expert_arena, packed_bytes
from expertyard.testing import random_problem

FORMATS = ["bf16", "int8", "int4", "int4-g32", "fp8", "mxfp4"]


@pytest.fixture(autouse=True)
def as_the_machine_is() -> Iterator[None]:
    yield
    _C.pretend_nodes(0)


@pytest.mark.parametrize("num_tokens", [1, 3, 150])
@pytest.mark.parametrize("format", FORMATS)
def test_nodes_change_no_bit(format: str, num_tokens: int) -> None:
    # 9 units of w13 and 5 strips of w2: no number of nodes divides both
    problem = random_problem(
        num_tokens=num_tokens, hidden_size=160, intermediate_size=144, num_experts=6, top_k=2
    )

    def run(nodes: int) -> torch.Tensor:
        _C.pretend_nodes(nodes)
        packer = ExpertPacker(6, 160, 144, format)
        for e in range(6):
            gate, up = problem.gate_up[e].chunk(2)
            packer.put(e, gate, up, problem.down[e])
        experts = packer.finish()
        return moe_experts(problem.hidden_states, problem.topk_ids, problem.topk_weights, experts)

    expected = run(1)
    assert expected.isfinite().all() and expected.abs().sum() > 0
    for nodes in (2, 3, 8):
        assert torch.equal(run(nodes), expected), nodes


def test_weights_in_place_too() -> None:
    p = random_problem(num_tokens=9, hidden_size=160, intermediate_size=144, num_experts=6, top_k=2)
    experts = p.pack()
    expected = moe_experts(p.hidden_states, p.topk_ids, p.topk_weights, experts)
    _C.pretend_nodes(3)
    assert torch.equal(moe_experts(p.hidden_states, p.topk_ids, p.topk_weights, experts), expected)


def test_an_arena_on_two_nodes_is_whole() -> None:
    _C.pretend_nodes(2)
    sizes = packed_bytes("int4", 512, 256)
    arena = expert_arena(5, sizes)
    assert arena.numel() == 5 * sum(sizes) and arena.data_ptr() % 64 == 0
    arena.fill_(7)
    assert bool((arena == 7).all())
