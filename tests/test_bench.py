# SPDX-License-Identifier: Apache-2.0
"""The benchmark measures what it says: weights, shares, peers, JSON and picture."""

from __future__ import annotations

import json
import xml.etree.ElementTree as ET
from dataclasses import replace
from typing import Any

import pytest
import torch

from expertyard.bench import measure as measuring
from expertyard.bench.layer import Layer, make_call, make_layer
from expertyard.bench.limits import Limits, l3_bytes
from expertyard.bench.measure import Effort, Plan, Variant, measure, own_variants
from expertyard.bench.peers import PEERS, Peer
from expertyard.bench.plot import draw
from expertyard.bench.report import to_json, to_table
from expertyard.bench.shapes import SHAPES, Shape
from expertyard.cli import main
from expertyard.errors import KernelError
from expertyard.formats import get_format
from expertyard.native import _C
from expertyard.packing import packed_bytes
from expertyard.reference import moe_experts_reference
from expertyard.testing import calc_diff

SMALL = SHAPES["small"]
OAI = replace(SMALL, activation="swigluoai", bias=True)
BRIEF = Effort(seconds=0, min_samples=1, max_samples=1)
ROW_KEYS = {
    *("shape", "format", "mode", "kernel", "num_tokens", "routing", "threads"),
    *("median_ms", "gbps", "gflops", "r_mem", "r_cmp", "r_roof", "peers"),
}

# oneDNN's bf16 and exact 8-bit products in torch want what such CPUs have
VNNI = any(k["isa"] == "avx512_vnni" and k["runnable"] for k in _C.kernels())


@pytest.fixture(scope="module", params=[SMALL, OAI], ids=["silu", "swigluoai"])
def layer(request: Any) -> Layer:
    return make_layer(request.param)


def test_experts_all_differ_and_the_reference_knows_each(layer: Layer) -> None:
    call = make_call(layer.shape, 9, "uniform")
    gate_up, down = layer.stacked()
    assert len({tuple(w.flatten()[:64].tolist()) for w in gate_up}) == layer.shape.num_experts
    bias = None
    if layer.gate_bias is not None and layer.up_bias is not None:
        bias = torch.stack((layer.gate_bias, layer.up_bias), 2).flatten(1)
    expected = moe_experts_reference(
        call.hidden_states,
        call.topk_ids,
        call.topk_weights,
        gate_up,
        down,
        gate_up_bias=bias,
        down_bias=layer.down_bias,
        activation=layer.shape.activation,
        interleaved=layer.interleaved,
    )
    assert calc_diff(layer.reference(call, layer.drawn_rows()), expected) < 1e-12


@pytest.mark.parametrize("format", ["bf16", "fp32", "int8", "int4-g32-asym", "fp8", "mxfp4"])
def test_every_variant_computes_the_format(layer: Layer, format: str) -> None:
    call = make_call(layer.shape, 9, "zipf")
    expected = layer.reference(call, layer.drawn_rows(format))
    variants = own_variants(layer, format)
    assert {v.mode for v in variants} == (
        {"exact", "fast"} if format[:3] in ("int", "mxf") else {"exact"}
    )
    for variant in variants:
        got = variant.run(call.hidden_states, call.topk_ids, call.topk_weights)
        assert calc_diff(got, expected) < (5e-3 if variant.mode == "exact" else 4e-2)


def test_every_layer_is_far_beyond_the_caches_and_moves_by_whole_blocks() -> None:
    for shape in SHAPES.values():
        assert shape.hidden_size % 32 == 0 and shape.intermediate_size % 16 == 0
        if shape.name == "small":
            continue
        least = sum(packed_bytes("int4", shape.hidden_size, shape.intermediate_size))
        assert least * shape.num_experts > 256 << 20
    assert 1 << 18 <= l3_bytes() <= 1 << 32


class Known:
    """Limits of a machine that reads 10 GB/s and multiplies at 100 GFLOP/s."""

    num_threads = 1

    def read_gbps(self) -> float:
        return 10.0

    def peak_gflops(self, kernel: str) -> float:
        return 100.0

    def settle(self, seconds: float) -> None:
        pass


@pytest.fixture(scope="module")
def silu() -> Layer:
    return make_layer(SMALL)


def measured(silu: Layer, plan: Plan) -> tuple[list[Any], dict[str, str]]:
    return measure(silu, plan, Known(), lambda step: None)  # type: ignore[arg-type]


def test_shares_are_what_they_are_defined_to_be(silu: Layer) -> None:
    plan = Plan("int8", tokens=(1, 40), routings=("uniform", "zipf"), effort=BRIEF)
    results, absent = measured(silu, plan)
    assert len(results) == 2 * 2 * 2 and not absent  # modes, token counts, routings
    size = sum(packed_bytes("int8", SMALL.hidden_size, SMALL.intermediate_size))
    for r in results:
        assert r.samples == 1 and r.error < 4e-2
        assert r.gflops == pytest.approx(SMALL.flops(r.num_tokens) / r.median_ms / 1e6)
        assert r.r_mem == pytest.approx(r.gbps / 10)
        assert r.r_cmp == pytest.approx(r.gflops / 100)
        assert r.r_roof == pytest.approx(max(r.r_mem, r.r_cmp))
        if r.num_tokens == 1:  # top_k experts, whatever is drawn
            assert r.gbps == pytest.approx(2 * size / r.median_ms / 1e6)
    zipf = [make_call(SMALL, 400, "zipf").topk_ids.flatten().bincount() for _ in range(2)]
    assert all(counts[0] > 2 * counts[-1] for counts in zipf)


def noise(*args: Any) -> Any:
    return torch.randn(args[0].shape, dtype=torch.bfloat16)


def test_a_wrong_kernel_stops_the_benchmark(silu: Layer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Variant, "run", lambda self, *args: noise(*args))
    with pytest.raises(KernelError, match=r"is wrong for 1 tokens: relative error \d"):
        measured(silu, Plan("bf16", tokens=(1,), effort=BRIEF))


def peer(name: str, make: Any, **more: Any) -> Peer:
    return Peer(name, "", {"bf16": "bf16"}, make, {"bf16": 2}, **more)


def test_a_peer_that_cannot_or_errs_is_named_with_the_reason(
    silu: Layer, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*args: Any) -> Any:
        raise RuntimeError("no such instruction\nat line 3")

    def ours(layer: Layer, base: str, threads: int) -> Any:
        return own_variants(layer, "bf16")[0].run

    made = [
        peer("right", ours),
        peer("gone", ours, absent=lambda: "not installed"),
        peer("broken", broken),
        peer("wrong", lambda *args: noise),
        peer("gelu_only", ours, activations=("gelu",)),
        peer("huge", ours, absent=lambda: None),
    ]
    monkeypatch.setattr(measuring, "PEERS", {p.name: p for p in made})
    monkeypatch.setattr(Peer, "needs", lambda self, *_: 1e18 if self.name == "huge" else 0.0)
    plan = Plan("bf16", tokens=(1, 3), peers=tuple(p.name for p in made), effort=BRIEF)
    results, absent = measured(silu, plan)
    assert absent.pop("huge").startswith("needs 931322574.6 GiB, ")
    assert absent.pop("wrong").startswith("its result is wrong for T=1: relative error")
    assert absent == {
        "gone": "not installed",
        "broken": "no such instruction",
        "gelu_only": "has no silu",
    }
    assert len(results) == 4  # packed and in place
    assert all(set(r.peers) == {"right"} and r.peers["right"] > 0 for r in results)


def test_peers_take_turns_in_groups_that_fit_into_memory(
    silu: Layer, monkeypatch: pytest.MonkeyPatch
) -> None:
    alive, most = 0, 0

    class Held:
        def __init__(self, run: Any) -> None:
            nonlocal alive, most
            self.run, alive = run, alive + 1
            most = max(most, alive)

        def __del__(self) -> None:
            nonlocal alive
            alive -= 1

        def __call__(self, *args: Any) -> Any:
            return self.run(*args)

    def make(layer: Layer, base: str, threads: int) -> Any:
        return Held(own_variants(layer, "bf16")[0].run)

    made = [peer(name, make) for name in ("a", "b", "c", "d", "e")]
    monkeypatch.setattr(measuring, "PEERS", {p.name: p for p in made})
    monkeypatch.setattr(Peer, "needs", lambda self, *_: 3.0)
    monkeypatch.setattr(measuring, "machine_memory", lambda: {"cpu": 10})  # 7 to be used
    plan = Plan("bf16", tokens=(1,), peers=tuple("abcde"), effort=BRIEF)
    results, absent = measured(silu, plan)
    assert most == 2 and not absent
    assert all(set(r.peers) == set("abcde") and r.samples == 3 for r in results)


@pytest.mark.parametrize("name", list(PEERS))
def test_a_peer_computes_the_layer_or_says_why_not(layer: Layer, name: str) -> None:
    chosen = PEERS[name]
    if reason := chosen.absent():
        assert len(reason) > 5
        pytest.skip(reason)
    for format in ("bf16", "int8", "int4", "fp8", "mxfp4"):
        base = get_format(format).base
        if base not in chosen.beside or layer.shape.activation not in chosen.activations:
            continue
        plan = Plan(format, tokens=(1, 7))
        try:
            measuring.check_peer(layer, chosen, plan, measuring.make_checks(layer, plan), 2)
        except ValueError as error:
            # without VNNI torch's own 8-bit products saturate: a wrong peer is named, as here
            reasons = ("ignores", "takes whole blocks", "engine for this CPU")
            assert any(r in str(error) for r in reasons) or (name == "linear_dynamic" and not VNNI)
        except RuntimeError as error:
            assert "needs" in str(error) or "need the cpu support" in str(error)
    layer.forget()


def test_the_command_writes_json_and_a_picture(tmp_path: Any, capsys: Any) -> None:
    file, picture = tmp_path / "out.json", tmp_path / "out.svg"
    code = main(
        [
            *("bench", "--shapes", "sma", "--formats", "int4,bf16", "--tokens", "1,5", "--quick"),
            *("--peers", "onednn,int4pack", "--routing", "zipf", "--threads", "1"),
            *("--json", str(file), "--svg", str(picture)),
        ]
    )
    out = capsys.readouterr().out
    assert code == 0 and "of read" in out and "int4 fast" not in out
    found = json.loads(file.read_text())
    assert found["schema"] == 1 and {"cpu", "threads", "torch", "dispatch_us"} <= set(
        found["machine"]
    )
    assert set(found["limits"]) == {"read_gbps", "bf16_gflops", "int8_gops", "fma_gflops"}
    rows = found["results"]
    assert len(rows) == 8 and all(set(row) >= ROW_KEYS for row in rows)
    assert {row["routing"] for row in rows} == {"zipf"} and {row["threads"] for row in rows} == {1}
    assert {(row["format"], row["mode"]) for row in rows} == {
        ("int4", "exact"),
        ("int4", "fast"),
        ("bf16", "exact"),
    }
    assert all(row["kernel"] in out for row in rows)
    assert all(
        set(row["peers"])
        == ({"int4pack"} if row["format"] == "int4" else {"onednn"} if VNNI else set())
        for row in rows
    )
    drawn = ET.fromstring(picture.read_text())
    assert len(drawn.findall(".//{*}polyline")) == 4


def row(shape: str, format: str, count: int, share: float, routing: str = "uniform") -> Any:
    kernel = f"{format}_avx2"
    return {
        "shape": shape,
        "format": format,
        "mode": "exact",
        "kernel": kernel,
        "num_tokens": count,
        "routing": routing,
        "r_roof": share,
    }


def test_the_picture_has_a_panel_a_shape_and_routing_and_a_line_a_format() -> None:
    rows = [
        row(shape, format, count, 0.1 + count / 2000, routing)
        for shape in ("a<b", "c")
        for routing in ("uniform", "zipf")
        for format in ("int8", "int4")
        for count in (1, 16, 1024)
    ]
    drawn = ET.fromstring(draw(rows, "x & y"))
    lines = drawn.findall(".//{*}polyline")
    assert len(lines) == 2 * 2 * 2
    texts = [t.text for t in drawn.findall(".//{*}text")]
    assert "a<b, zipf routing" in texts and "x & y" in texts
    # higher share is higher up: smaller y
    first, _, last = (point.split(",") for point in lines[0].attrib["points"].split())
    assert float(first[0]) < float(last[0]) and float(first[1]) > float(last[1])
    assert ET.fromstring(draw([])) is not None


def test_table_and_json_of_nothing_are_empty() -> None:
    assert to_table([]).row_count == 0
    assert to_json([], {}, {})["results"] == []


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (["--shapes", "Mixtral-8x8B"], "--shapes: 'Mixtral-8x8B' is not known; did you mean Mix"),
        (["--shapes", ""], "--shapes: '' is not known; there are"),
        (["--formats", "int5"], "format: expected one of"),
        (["--modes", "quick"], "--modes: 'quick' is not known"),
        (["--routing", "all"], "--routing: 'all' is not known; there are uniform, zipf"),
        (["--tokens", "1,x"], "--tokens: expected numbers"),
        (["--tokens", "0"], "--tokens: expected numbers"),
        (["--peers", "kt"], "--peers: 'kt' is not known; did you mean kt_kernel or"),
        (["--threads", "0"], "--threads: expected 1 or more"),
        (["--json", "/nowhere/at/all.json"], "--json: there is no folder"),
        (["--svg", "/nowhere/at/all.svg"], "--svg: there is no folder"),
        (["--shapes", "small", "--formats", "bf16", "--modes", "fast"], "nothing to measure"),
    ],
)
def test_senseless_flags_are_a_sentence(flags: list[str], sentence: str, capsys: Any) -> None:
    assert main(["bench", "--tokens", "1", "--peers", "none", *flags]) != 0
    said = capsys.readouterr().err
    assert sentence in " ".join(said.split()) and "Traceback" not in said


def test_limits_of_this_machine_are_plausible() -> None:
    limits = Limits(1).summary()
    assert limits["read_gbps"] is not None and 0.1 < limits["read_gbps"] < 10_000
    assert limits["fma_gflops"] is not None and limits["fma_gflops"] > 0.1


def test_shape_counts_its_work() -> None:
    shape = Shape("x", 64, 32, 4, 2)
    assert shape.expert_params == 3 * 64 * 32
    assert shape.flops(5) == 2 * 3 * 64 * 32 * 2 * 5
