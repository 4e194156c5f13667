# SPDX-License-Identifier: Apache-2.0
"""The op's contract: what it accepts, what it computes, what it refuses and with which sentence."""

import copy
import pickle
from dataclasses import replace

import pytest
import torch

from expertyard import PackedExperts, moe_experts
from expertyard.errors import KernelError
from expertyard.ops import moe_experts_into
from expertyard.testing import Problem, calc_diff, random_problem

OP = torch.ops.expertyard.moe_experts
TOLERANCE = 3.5e-3  # bf16 in, bf16 out


def problem(**changes) -> Problem:
    sizes = {"hidden_size": 96, "intermediate_size": 48, "num_experts": 6, "top_k": 3}
    return random_problem(**{"num_tokens": 10, **sizes, **changes})


def run(p: Problem, packed: PackedExperts | None = None, **changes) -> torch.Tensor:
    p = replace(p, **changes)
    return moe_experts(p.hidden_states, p.topk_ids, p.topk_weights, packed or p.pack())


@pytest.mark.parametrize("none", [-1, 6])
def test_an_id_of_minus_one_or_num_experts_adds_nothing(none: int) -> None:
    p = problem()
    ids = p.topk_ids.clone()
    ids[::2, 1] = none
    ids[3] = none  # a token without any expert
    p = replace(p, topk_ids=ids)
    out = run(p)
    assert calc_diff(out, p.reference()) < TOLERANCE
    assert torch.count_nonzero(out[3]) == 0


@pytest.mark.parametrize("ids_dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("weights_dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_id_and_weight_dtypes(ids_dtype: torch.dtype, weights_dtype: torch.dtype) -> None:
    p = problem()
    p = replace(p, topk_ids=p.topk_ids.to(ids_dtype), topk_weights=p.topk_weights.to(weights_dtype))
    assert calc_diff(run(p), p.reference()) < TOLERANCE


def test_inputs_need_not_be_contiguous() -> None:
    p = problem()
    expected = run(p)
    hidden = torch.randn(p.hidden_states.shape[1], 10).bfloat16().T.copy_(p.hidden_states)
    ids, weights = p.topk_ids.T.contiguous().T, p.topk_weights.repeat(1, 2)[:, :3]
    assert not (hidden.is_contiguous() or ids.is_contiguous() or weights.is_contiguous())
    out = run(p, hidden_states=hidden, topk_ids=ids, topk_weights=weights)
    assert torch.equal(out, expected)


def test_weights_are_used_where_they_lie() -> None:
    """No copy: a change of the tensor changes the next result; strided views work."""
    p = problem()
    wide = torch.zeros(6, 96, 96 + 32).bfloat16()
    view = wide[:, :, 16 : 16 + 96]
    view.copy_(p.gate_up)
    packed = replace(p, gate_up=view).pack()
    assert torch.equal(run(p, packed), run(p))
    p.down.mul_(2)
    assert calc_diff(run(p, p.pack()), p.reference()) < TOLERANCE
    view.zero_()
    assert torch.count_nonzero(run(p, packed)) == 0


def test_weights_at_odd_addresses() -> None:
    """A tensor in a file need not be aligned."""
    for dtype, size in ((torch.bfloat16, 2), (torch.float32, 4)):
        p = problem(format="bf16" if size == 2 else "fp32")

        def shifted(t: torch.Tensor, dtype=dtype, size=size) -> torch.Tensor:
            raw = torch.empty(t.numel() * size + 64, dtype=torch.uint8)
            start = (-raw.data_ptr()) % 64 + size  # one value off a cache line
            out = raw[start : start + t.numel() * size].view(dtype).view(t.shape)
            return out.copy_(t)

        odd = replace(p, gate_up=shifted(p.gate_up), down=shifted(p.down))
        assert torch.equal(run(odd), run(p))


def test_experts_that_are_not_here_are_left_out() -> None:
    p = problem()
    gate, up = p.gate_up.chunk(2, dim=1)
    here = [0, 2, 5]
    pick = lambda t: [t[e] if e in here else None for e in range(6)]  # noqa: E731
    packed = PackedExperts.from_experts(pick(gate), pick(up), pick(p.down))
    only_here = torch.where(torch.isin(p.topk_ids, torch.tensor(here)), p.topk_ids, -1)
    assert calc_diff(run(p, packed), replace(p, topk_ids=only_here).reference()) < TOLERANCE


def test_a_split_layer_sums_to_the_whole() -> None:
    p = problem(hidden_dtype=torch.float32, format="fp32")
    gate, up = p.gate_up.chunk(2, dim=1)
    parts = []
    for half in (0, 1):
        pick = lambda t, half=half: [t[e] if e % 2 == half else None for e in range(6)]  # noqa: E731
        parts.append(run(p, PackedExperts.from_experts(pick(gate), pick(up), pick(p.down))))
    assert calc_diff(parts[0] + parts[1], p.reference()) < 2e-6


BAD_CALLS = {
    "hidden_states of another width": (
        lambda p: {"hidden_states": p.hidden_states[:, :90]},
        r"hidden_states: expected \[num_tokens, hidden_size=96\].* got \[10, 90\]",
    ),
    "hidden_states of integers": (
        lambda p: {"hidden_states": p.hidden_states.int()},
        r"hidden_states: expected .*bfloat16, float16 or float32, got \[10, 96\] Int",
    ),
    "hidden_states of one dimension": (
        lambda p: {"hidden_states": p.hidden_states[0]},
        r"hidden_states: expected .* got \[96\]",
    ),
    "too few ids": (
        lambda p: {"topk_ids": p.topk_ids[:9]},
        r"topk_ids: expected \[num_tokens=10, top_k\] int32 or int64, got \[9, 3\]",
    ),
    "float ids": (
        lambda p: {"topk_ids": p.topk_ids.float()},
        r"topk_ids: expected .* int32 or int64, got \[10, 3\] Float",
    ),
    "weights of another top_k": (
        lambda p: {"topk_weights": p.topk_weights[:, :2]},
        r"topk_weights: expected \[num_tokens=10, top_k=3\] .* got \[10, 2\]",
    ),
    "integer weights": (
        lambda p: {"topk_weights": p.topk_weights.long()},
        r"topk_weights: expected .* got \[10, 3\] Long",
    ),
}


@pytest.mark.parametrize("case", BAD_CALLS)
def test_bad_calls_get_a_sentence(case: str) -> None:
    change, message = BAD_CALLS[case]
    p = problem()
    packed = p.pack()
    before = run(p, packed)
    with pytest.raises(KernelError, match=message):
        run(p, packed, **change(p))
    assert torch.equal(run(p, packed), before)  # nothing is left half done


@pytest.mark.parametrize("bad", [7, -2, 2**31, -(2**40)])
def test_ids_out_of_range_are_an_error(bad: int) -> None:
    p = problem()
    ids = p.topk_ids.clone()
    ids[4, 2] = bad
    with pytest.raises(KernelError, match=rf"topk_ids\[4, 2\] is {bad}: expected .* 0 to 5"):
        run(p, topk_ids=ids)


def test_a_handle_that_is_not_alive_is_an_error() -> None:
    p = problem()
    packed = p.pack()
    handle = packed.handle
    del packed
    other = p.pack()  # takes the same slot again
    assert other.handle != handle
    for bad in (handle, -1, 12345, 2**62):
        with pytest.raises(RuntimeError, match="not a live handle"):
            OP(p.hidden_states, p.topk_ids, p.topk_weights, bad)


BAD_WEIGHTS = {
    "rows that do not pair": (
        lambda g, d: {"gate_up": g[:, :95]},
        "2 \\* intermediate_size",
    ),
    "down of another size": (lambda g, d: {"down": d[:, :, :40]}, "intermediate_size"),
    "two dimensions": (lambda g, d: {"gate_up": g[0]}, "gate_up: expected"),
    "dtypes that differ": (lambda g, d: {"down": d.float()}, r"down\[0\]: expected .*bfloat16"),
    "a dtype without a kernel": (
        lambda g, d: {"gate_up": g.double(), "down": d.double()},
        "expected .* bfloat16, float16, float32, got .* torch.float64",
    ),
    "columns that are not contiguous": (
        lambda g, d: {"gate_up": g.transpose(1, 2).contiguous().transpose(1, 2)},
        "contiguous rows",
    ),
    "an activation nobody has": (
        lambda g, d: {"activation": "swish9"},
        "expected one of silu, .*, got 'swish9'",
    ),
    "a bias of another size": (
        lambda g, d: {"gate_up_bias": torch.zeros(6, 95)},
        r"gate_up_bias: expected \[6, 96\], got \[6, 95\]",
    ),
    "meta tensors": (
        lambda g, d: {"gate_up": g.to("meta"), "down": d.to("meta")},
        "meta",
    ),
}


@pytest.mark.parametrize("case", BAD_WEIGHTS)
def test_bad_weights_get_a_sentence(case: str) -> None:
    change, message = BAD_WEIGHTS[case]
    p = problem()
    arguments = {"gate_up": p.gate_up, "down": p.down, **change(p.gate_up, p.down)}
    with pytest.raises(KernelError, match=message):
        PackedExperts.from_tensors(arguments.pop("gate_up"), arguments.pop("down"), **arguments)


def test_deepcopy_shares_weights_and_pickle_refuses() -> None:
    p = problem()
    packed = p.pack()
    twin = copy.deepcopy(packed)
    assert twin.handle != packed.handle
    expected = run(p, packed)
    del packed
    assert torch.equal(run(p, twin), expected)
    with pytest.raises(KernelError, match="cannot be pickled"):
        pickle.dumps(twin)


def test_backward_raises_and_forward_under_grad_works() -> None:
    p = problem()
    hidden = p.hidden_states.clone().requires_grad_()
    out = run(p, hidden_states=hidden)
    assert out.requires_grad and torch.equal(out.detach(), run(p))
    with pytest.raises(KernelError, match="no gradient"):
        out.sum().backward()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_opcheck(dtype: torch.dtype) -> None:
    p = problem(hidden_dtype=dtype)
    packed = p.pack()
    inputs = (p.hidden_states, p.topk_ids, p.topk_weights, packed.handle)
    torch.library.opcheck(OP, inputs)
    torch.library.opcheck(OP, (p.hidden_states[:0], p.topk_ids[:0], p.topk_weights[:0], inputs[3]))
    strided = p.hidden_states.T.contiguous().T
    torch.library.opcheck(OP, (strided, *inputs[1:]))


def test_compiles_to_one_graph() -> None:
    p = problem()
    packed = p.pack()

    def layer(hidden, ids, weights):
        return torch.relu(moe_experts(hidden * 2, ids, weights, packed)) + 1

    explained = torch._dynamo.explain(layer)(p.hidden_states, p.topk_ids, p.topk_weights)
    assert (explained.graph_count, explained.graph_break_count) == (1, 0)
    compiled = torch.compile(layer, fullgraph=True, dynamic=True)
    for n in (10, 4, 1):
        args = (p.hidden_states[:n], p.topk_ids[:n], p.topk_weights[:n])
        assert torch.equal(compiled(*args), layer(*args))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_result_goes_into_the_callers_memory(dtype):
    """In float32 it is not rounded; into the hidden dtype it is the op's own result."""
    p = random_problem(
        num_tokens=9, hidden_size=72, intermediate_size=40, num_experts=6, top_k=3, format="bf16"
    )
    packed = p.pack()
    out = torch.full((9, 72), float("nan"), dtype=dtype)
    moe_experts_into(p.hidden_states, p.topk_ids, p.topk_weights, packed, out)
    whole = moe_experts(p.hidden_states, p.topk_ids, p.topk_weights, packed)
    assert torch.equal(out.bfloat16(), whole)
    if dtype == torch.float32:
        assert calc_diff(out, p.reference()) < calc_diff(whole, p.reference())


@pytest.mark.parametrize(
    "out",
    [torch.empty(9, 71), torch.empty(8, 72), torch.empty(9, 72, dtype=torch.float16),
     torch.empty(72, 9).T],
    ids=["columns", "rows", "dtype", "strides"],
)  # fmt: skip
def test_memory_of_the_wrong_kind_is_refused(out):
    p = random_problem(
        num_tokens=9, hidden_size=72, intermediate_size=40, num_experts=6, top_k=3, format="bf16"
    )
    with pytest.raises(KernelError, match=r"out: expected contiguous \[num_tokens=9, hidden_size="):
        moe_experts_into(p.hidden_states, p.topk_ids, p.topk_weights, p.pack(), out)


@pytest.mark.parametrize("interleaved", [False, True])
def test_experts_come_and_go_by_a_row_of_pointers(interleaved):
    p = random_problem(
        num_tokens=9, hidden_size=72, intermediate_size=40, num_experts=6, top_k=3, format="bf16",
        bias=True, interleaved=interleaved,
    )  # fmt: skip
    whole = p.pack()
    some = whole.holding({e: whole.expert(e) for e in (1, 4)})
    assert some.here() == (1, 4) and some.expert(0) is None
    assert some.nbytes == 2 * whole.expert_bytes(0)

    def run(packed):
        return moe_experts(p.hidden_states, p.topk_ids, p.topk_weights, packed)

    for e in (0, 2, 3, 5):
        some.write(e, whole.expert(e))
    assert torch.equal(run(some), run(whole))
    some.write(2, None)
    p.topk_ids[p.topk_ids == 2] = -1
    assert torch.equal(run(some), run(whole)) and some.here() == (0, 1, 3, 4, 5)
