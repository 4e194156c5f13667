# SPDX-License-Identifier: Apache-2.0
"""Every kernel of the table against float64, on every edge shape. A new kernel: no new test."""

import pytest
import torch

from expertyard.native import _C
from expertyard.ops import moe_experts
from expertyard.reference import ACTIVATIONS
from expertyard.testing import Kernel, calc_diff, kernels, poison_scratch, random_problem

SHAPES = {  # hidden_size, intermediate_size, num_experts
    "round": (128, 64, 8),
    "odd": (131, 67, 8),
    "narrow": (8, 5, 8),
    "no-multiple-of-64": (200, 96, 8),
    "long-rows": (2080, 40, 8),
    "long-h": (72, 2100, 8),
}
KERNELS = [
    pytest.param(
        k,
        id=k.name,
        marks=[] if k.runnable else pytest.mark.skip(f"CPU lacks {' '.join(k.missing)}"),
    )
    for k in kernels()
]


# What is the schedule's and not a kernel's: one kernel of each layout and mode, in the
# plainest room and in the best one that this CPU has.
_BEST = {
    (k.layout, k.mode): k
    for k in kernels()
    if k.runnable
    and k.isa != "scalar"
    and k.format == ("bf16" if k.layout == "rows" else "int4")
    and k.name == _C.kernel_name(k.format, "bfloat16", k.layout, k.mode)
}
_PLAIN = {
    (k.layout, k.mode): k
    for k in kernels()
    if k.isa == "scalar" and k.format == ("bf16" if k.layout == "rows" else "int4")
}
EXAMPLES = [pytest.param(k, id=k.name) for k in (*_BEST.values(), *_PLAIN.values())]


def forced(chosen: Kernel):
    _C.force_isa(chosen.isa)
    poison_scratch()
    yield chosen
    _C.force_isa(None)


@pytest.fixture(params=KERNELS)
def kernel(request: pytest.FixtureRequest):
    yield from forced(request.param)


@pytest.fixture(params=EXAMPLES)
def example(request: pytest.FixtureRequest):
    yield from forced(request.param)


def check(kernel: Kernel, hidden_dtype: torch.dtype | None = None, **problem) -> None:
    for dtype in kernel.hidden_dtypes() if hidden_dtype is None else (hidden_dtype,):
        p = random_problem(
            **{"format": kernel.format, **problem},
            layout=kernel.layout,
            mode=kernel.mode,
            hidden_dtype=dtype,
        )
        packed = p.pack()
        out = moe_experts(p.hidden_states, p.topk_ids, p.topk_weights, packed)
        assert packed.last_kernel == kernel.name  # what we mean to test is what ran
        assert out.dtype == dtype and out.is_contiguous()
        assert calc_diff(out, p.reference()) <= kernel.tolerance(dtype)


@pytest.mark.parametrize("num_tokens", [1, 2, 7, 64])
@pytest.mark.parametrize("shape", SHAPES)
def test_kernel_matches_float64(kernel: Kernel, shape: str, num_tokens: int) -> None:
    hidden_size, intermediate_size, num_experts = SHAPES[shape]
    check(
        kernel,
        num_tokens=num_tokens,
        hidden_size=hidden_size,
        intermediate_size=intermediate_size,
        num_experts=num_experts,
        top_k=2,
        seed=num_tokens,
    )


@pytest.mark.parametrize("scale_dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_every_variant_and_type_of_scale(kernel: Kernel, scale_dtype: torch.dtype) -> None:
    """Groups of every size, with a short last one; zeros; one token, a tile, several tiles."""
    if kernel.layout == "rows" or kernel.format == "bf16":
        pytest.skip("plain weights have no scales")
    for format in kernel.formats():
        for num_tokens in (1, 5, 30):
            check(
                kernel,
                kernel.hidden_dtypes()[0],
                num_tokens=num_tokens,
                hidden_size=232,
                intermediate_size=172,
                num_experts=2,
                top_k=1,
                bias=True,
                format=format,
                scale_dtype=scale_dtype,
            )


@pytest.mark.parametrize("top_k", range(1, 9))
def test_any_top_k(example: Kernel, top_k: int) -> None:
    check(
        example,
        num_tokens=9,
        hidden_size=96,
        intermediate_size=48,
        num_experts=8,
        top_k=top_k,
        seed=top_k,
    )


@pytest.mark.parametrize("bias", [False, True], ids=["no-bias", "bias"])
@pytest.mark.parametrize("interleaved", [False, True], ids=["concatenated", "interleaved"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activation_bias_and_layout(
    kernel: Kernel, activation: str, interleaved: bool, bias: bool
) -> None:
    """Gates and ups of unit variance: a limit of 0.7 cuts half of them off."""
    for num_tokens in (3, 40):
        check(
            kernel,
            num_tokens=num_tokens,
            hidden_size=90,
            intermediate_size=50,
            limit=0.7,
            num_experts=4,
            top_k=2,
            activation=activation,
            interleaved=interleaved,
            bias=bias,
        )


@pytest.mark.parametrize("num_tokens", [1, 7, 64, 400])
@pytest.mark.parametrize("shape", SHAPES)
def test_experts_without_a_gate(kernel: Kernel, shape: str, num_tokens: int) -> None:
    """Blocks of 32 up rows: the last one short, one group of h or several, any number of tokens."""
    hidden_size, intermediate_size, num_experts = SHAPES[shape]
    check(
        kernel,
        kernel.hidden_dtypes()[0],
        num_tokens=num_tokens,
        hidden_size=hidden_size,
        intermediate_size=intermediate_size,
        num_experts=num_experts,
        top_k=2,
        activation="relu2",
        bias=num_tokens == 7,
    )


@pytest.mark.parametrize("activation", ["silu_clamp_before", "silu_clamp_after", "swigluoai"])
def test_no_limit_is_infinite(example: Kernel, activation: str) -> None:
    check(
        example,
        num_tokens=5,
        hidden_size=70,
        intermediate_size=36,
        num_experts=4,
        top_k=2,
        activation=activation,
        limit=float("inf"),
    )


def test_softcap_keeps_the_digits_of_small_activations(example: Kernel) -> None:
    """tanh is no difference of large numbers: small gates and ups are as exact as others."""
    p = random_problem(
        num_tokens=6,
        hidden_size=64,
        intermediate_size=32,
        num_experts=4,
        top_k=2,
        format=example.format,
        layout=example.layout,
        mode=example.mode,
        hidden_dtype=example.hidden_dtypes()[-1],
        activation="softcap_silu",
        alpha=4.0,
        limit=25.0,
    )
    x = p.hidden_states * 1e-3
    out = moe_experts(x, p.topk_ids, p.topk_weights, p.pack())
    expected = type(p)(**{**vars(p), "hidden_states": x}).reference()
    assert calc_diff(out, expected) <= example.tolerance(x.dtype)


@pytest.mark.parametrize("num_tokens", [13, 16, 17, 192, 193, 400])
def test_experts_hit_by_everyone_and_by_nobody(kernel: Kernel, num_tokens: int) -> None:
    """Every tile size, more tokens than one tile, experts without a token."""
    check(
        kernel,
        kernel.hidden_dtypes()[0],
        num_tokens=num_tokens,
        hidden_size=70,
        intermediate_size=36,
        num_experts=5,
        top_k=2,
        routing="same",
    )


def test_more_tokens_than_one_pass(example: Kernel) -> None:
    """h is bounded (128 MiB): a long prompt is computed in passes, here of 512 or 1024 tokens."""
    check(
        example,
        example.hidden_dtypes()[0],
        num_tokens=1100,
        hidden_size=8,
        intermediate_size=8192,
        num_experts=8,
        top_k=8,
    )


def test_no_tokens(example: Kernel) -> None:
    check(example, num_tokens=0, hidden_size=64, intermediate_size=32, num_experts=4, top_k=2)


def test_large_activations_saturate_like_the_reference(kernel: Kernel) -> None:
    """silu and its kin at +-1e4: exp must neither overflow nor turn into NaN."""
    for activation in ACTIVATIONS:
        p = random_problem(
            num_tokens=6,
            hidden_size=64,
            intermediate_size=32,
            num_experts=4,
            top_k=2,
            format=kernel.format,
            layout=kernel.layout,
            mode=kernel.mode,
            hidden_dtype=kernel.hidden_dtypes()[0],
            activation=activation,
        )
        x = p.hidden_states * 1e4
        out = moe_experts(x, p.topk_ids, p.topk_weights, p.pack())
        expected = type(p)(**{**vars(p), "hidden_states": x}).reference()
        assert calc_diff(out, expected) <= 2 * kernel.tolerance(x.dtype)


def test_nan_reaches_the_output_of_its_token_only(kernel: Kernel) -> None:
    p = random_problem(
        num_tokens=20,
        hidden_size=80,
        intermediate_size=40,
        num_experts=4,
        top_k=2,
        format=kernel.format,
        layout=kernel.layout,
        mode=kernel.mode,
        hidden_dtype=kernel.hidden_dtypes()[0],
    )
    p.hidden_states[7, 3] = float("nan")
    out = moe_experts(p.hidden_states, p.topk_ids, p.topk_weights, p.pack())
    bad = torch.isnan(out).any(dim=1)
    assert bad.nonzero().flatten().tolist() == [7]


def test_the_same_bits_for_any_number_of_threads(example: Kernel) -> None:
    p = random_problem(
        num_tokens=64,
        hidden_size=320,
        intermediate_size=200,
        num_experts=6,
        top_k=3,
        format=example.format,
        layout=example.layout,
        mode=example.mode,
        hidden_dtype=example.hidden_dtypes()[0],
    )
    packed = p.pack()
    threads = torch.get_num_threads()
    outs = []
    try:
        for n in (1, 2, threads):
            torch.set_num_threads(n)
            outs.append(moe_experts(p.hidden_states, p.topk_ids, p.topk_weights, packed))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(outs[0], out) for out in outs)
