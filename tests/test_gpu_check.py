# SPDX-License-Identifier: Apache-2.0
"""bench/gpu_check.sh, but for the GPU: what it says where there is none, arguments, parts,
resuming, the results file, and the random packed weights that it measures with."""

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

import expertyard as ey
from expertyard.bench.shapes import Shape
from expertyard.formats import get_format
from expertyard.packing import packed_bytes, scale_type_of
from expertyard.reference import moe_experts_reference
from expertyard.testing import Problem
from expertyard.weights import Blobs

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "bench"))

from gpu_check import __main__ as command  # noqa: E402
from gpu_check import crossovers, parts, probes, quantised_peers  # noqa: E402
from gpu_check.layers import checked_peer, checked_quantised_peer, random_blob  # noqa: E402
from gpu_check.run import run_parts  # noqa: E402
from gpu_check.state import State  # noqa: E402

MACHINE = {"name": "Fake", "capability": "9.0"}


class FakeLayer:
    def __init__(self, card: "FakeCard", contender: str) -> None:
        self.card, self.contender = card, contender

    def measure(self, tokens: int, routing: str) -> dict[str, Any]:
        if self.card.measurements_left == 0:
            raise RuntimeError("the card fell off the bus")
        self.card.measurements_left -= 1
        self.card.measured.append((self.contender, tokens, routing))
        return {"us": float(tokens)}

    def measure_with(self, family: str, tokens: int) -> dict[str, Any] | None:
        """cuda_stream is as fast as cuda_grouped up to 600 tokens, cuda_wgmma never is."""
        if family == "cuda_stream" and tokens > 1000:
            return None
        self.measure(tokens, family)
        slower = (family == "cuda_stream" and tokens > 600) or family == "cuda_wgmma"
        return {"us": tokens * (1.1 if slower else 1.0)}


class FakeCard:
    """What card.Card offers, without a GPU."""

    def __init__(self, measurements: int = 10**6) -> None:
        self.measurements_left = measurements
        self.measured: list[tuple[str, int, str]] = []
        self.calls: list[str] = []

    def build(self, seconds: float) -> dict[str, Any]:
        self.calls.append("build")
        return {"architecture": "90a-real"}

    def tests(self, seconds: float) -> dict[str, Any]:
        self.calls.append("tests")
        return {"summary": "3 passed"}

    def sanitizer(self, seconds: float) -> dict[str, Any]:
        self.calls.append("sanitizer")
        return {"left_out": "compute-sanitizer is not installed"}

    def ceilings(self) -> dict[str, Any]:
        self.calls.append("ceilings")
        return {"copy_tb_per_s": lambda: 3.0, "read_tb_per_s": lambda: 3.1}

    def handoff(self) -> dict[str, Any]:
        self.calls.append("handoff")
        return {"graph_flag_us": lambda: 3.0}

    capability = 90
    table: list[str]

    def write_crossovers(self, lines: list[str]) -> str:
        self.table = lines
        return "a file"

    def layer(self, shape: str, contender: str) -> FakeLayer | str | None:
        if contender == "vllm_marlin_int4":
            return "vllm_marlin_int4: not installed"
        return None if contender.startswith("vllm") else FakeLayer(self, contender)


def test_the_script_ends_with_a_sentence_where_there_is_no_gpu() -> None:
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    done = subprocess.run(
        ["bash", "bench/gpu_check.sh"], cwd=ROOT, capture_output=True, text=True, timeout=60,
        env={**os.environ, "PYTHON": sys.executable},
    )  # fmt: skip
    assert done.returncode == command.NO_GPU
    assert done.stderr.startswith("gpu_check: ") and done.stderr.count("\n") == 1
    assert "GPU" in done.stderr or "CUDA build" in done.stderr


def test_arguments(capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main(["--list"]) == 0
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == [*parts.PART_NAMES]
    assert command.main(["--minutes", "0"]) == 2
    with pytest.raises(SystemExit):
        command.main(["--part", "celings"])
    options = command.parser().parse_args(["--part", "tests", "--part", "build"])
    assert options.part == ["tests", "build"]


def test_all_parts_end_up_in_one_file(tmp_path: Path) -> None:
    card, out = FakeCard(), tmp_path / "results" / "gpu.json"
    assert run_parts(State.load(out, MACHINE), card, parts.PART_NAMES, [], 540) == 0
    data = json.loads(out.read_text())
    assert data["machine"] == MACHINE
    assert {p["status"] for p in data["parts"].values()} == {"done"}
    assert data["parts"]["ceilings"]["results"]["copy_tb_per_s"] == 3.0
    for shape in parts.SHAPE_NAMES:
        results = data["parts"][f"layer:{shape}"]["results"]
        for contender in parts.FORMATS:
            for tokens in parts.TOKENS:
                assert results[f"{contender}/uniform/{tokens}"] == {"us": tokens}
            assert f"{contender}/zipf/16" in results
        assert results["vllm_fused_experts/uniform/1"] is None  # it is not on this machine
        assert results["left_out"] == {"vllm_marlin_int4": "vllm_marlin_int4: not installed"}
        assert results["hf_batched_mm/uniform/8"] and "hf_batched_mm/uniform/16" not in results
    assert not list(out.parent.glob("*.part"))


def test_borders_are_measured_and_written_as_the_table_that_the_library_reads(
    tmp_path: Path,
) -> None:
    card, out = FakeCard(), tmp_path / "gpu.json"
    assert run_parts(State.load(out, MACHINE), card, ["crossovers"], [], 540) == 0
    results = json.loads(out.read_text())["parts"]["crossovers"]["results"]
    assert [crossovers.HEAD, *results["table"]] == card.table and results["file"] == "a file"
    # 128 experts, 8 of them a token: 128 tokens are 8 pairs an expert, and at most 1024 of all
    assert "90 int4 128 2048 768 128 8 256" in card.table
    assert len(card.table) == 1 + len(crossovers.FORMATS) * len(parts.SHAPE_NAMES)
    measured = len(card.measured)
    assert run_parts(State.load(out, MACHINE), card, [], ["crossovers"], 540) == 0
    assert len(card.measured) == 2 * measured


@pytest.mark.parametrize(
    ("points", "pairs"),
    [
        ([], 0),
        ([(2, 1.0, 2.0), (4, 1.0, 2.0)], 4),  # never faster
        ([(2, 1.0, 2.0), (8, 2.0, 1.0), (32, 2.0, 1.0)], 4),  # in the middle, as a ratio
        ([(2, 2.0, 1.0), (8, 2.0, 1.0)], 1),  # always faster
        ([(2, 2.0, 1.0), (8, 1.0, 2.0), (32, 2.0, 1.0)], 16),  # from where on it stays so
    ],
)
def test_a_border_is_where_the_other_becomes_faster_and_stays_so(
    points: list[tuple[float, float, float]], pairs: float
) -> None:
    assert crossovers.border(points) == pytest.approx(pairs)


ALIGNED = Shape("aligned", 256, 128, 6, 2)


def fake_vllm(monkeypatch: pytest.MonkeyPatch, wrong: float = 1.0) -> None:
    """fused_marlin_moe and what packs for it, in torch: a "packed" matrix is a plain one."""
    kind = SimpleNamespace(id=7)

    def marlin_quantize(w: Tensor, quant_type: Any, group: int, act_order: bool) -> Any:
        assert quant_type is kind and group == 128 and not act_order
        scale = w.float().unflatten(0, (-1, group)).abs().amax(1) / 7
        each = scale.repeat_interleave(group, 0)
        kept = ((w.float() / each).round() * each).to(w.dtype)
        return [kept, kept, scale.to(w.dtype)]

    def fused_marlin_moe(**k: Any) -> Tensor:
        assert k["quant_type_id"] == 7 and k["topk_ids"].dtype == torch.int32
        assert k["w1"].shape[0] == k["w1_scale"].shape[0] == k["global_num_experts"] == 6
        return wrong * moe_experts_reference(
            k["hidden_states"], k["topk_ids"], k["topk_weights"], k["w1"].mT, k["w2"].mT,
            dtype=torch.float32,
        ).to(k["hidden_states"].dtype)  # fmt: skip

    layers = "vllm.model_executor.layers"
    for name, content in {
        f"{layers}.fused_moe.fused_marlin_moe": {"fused_marlin_moe": fused_marlin_moe},
        f"{layers}.quantization.utils.marlin_utils_test": {"marlin_quantize": marlin_quantize},
        "vllm.scalar_type": {"scalar_types": SimpleNamespace(uint4b8=kind)},
    }.items():
        fake_module(monkeypatch, name, **content)


def fake_module(monkeypatch: pytest.MonkeyPatch, name: str, **content: Any) -> None:
    parts_of = name.split(".")
    for i in range(1, len(parts_of) + 1):
        full = ".".join(parts_of[:i])
        if full not in sys.modules or i == len(parts_of):
            monkeypatch.setitem(sys.modules, full, ModuleType(full))
    for key, value in content.items():
        setattr(sys.modules[name], key, value)


def fake_deep_gemm(monkeypatch: pytest.MonkeyPatch, wrong: bool = False) -> None:
    def grouped(a: Any, b: Any, out: Tensor, whose: Tensor) -> None:
        x = (a[0].float().unflatten(1, (-1, 128)) * a[1][..., None]).flatten(1)
        w = b[0].float() * b[1].repeat_interleave(128, 1).repeat_interleave(128, 2)
        assert whose.dtype == torch.int32 and out.dtype == torch.bfloat16
        assert whose.shape[0] == x.shape[0] == out.shape[0] and x.shape[0] % 16 == 0
        for begin in range(0, x.shape[0], 16):  # a run has one owner, or none behind its rows
            assert len({*whose[begin : begin + 16].tolist()} - {-1}) <= 1
        out.fill_(float("nan"))
        for row, expert in enumerate(whose.tolist()):
            if expert >= 0:
                out[row] = w[expert - 1 if wrong else expert] @ x[row]

    fake_module(
        monkeypatch, "deep_gemm", m_grouped_fp8_gemm_nt_contiguous=grouped,
        get_m_alignment_for_contiguous_layout=lambda: 16,
    )  # fmt: skip


def test_quantised_peers_are_right_before_they_are_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    weights = weights_of(ALIGNED)
    fake_vllm(monkeypatch)
    assert callable(checked_quantised_peer(ALIGNED, "vllm_marlin_int4", weights))
    fake_vllm(monkeypatch, wrong=1.1)
    said = checked_quantised_peer(ALIGNED, "vllm_marlin_int4", weights)
    assert said == "vllm_marlin_int4: relative error 0.1 in a call of 4"
    fake_deep_gemm(monkeypatch)
    assert callable(checked_quantised_peer(ALIGNED, "deep_gemm_fp8", weights))
    fake_deep_gemm(monkeypatch, wrong=True)
    assert "relative error" in str(checked_quantised_peer(ALIGNED, "deep_gemm_fp8", weights))
    assert "no multiples of 128" in str(
        checked_quantised_peer(SMALL, "deep_gemm_fp8", weights_of(SMALL))
    )


def test_quantised_peers_that_are_not_there_say_so() -> None:
    for name in quantised_peers.MAKERS:
        said = checked_quantised_peer(SMALL_WITH_BIAS, name, weights_of(SMALL_WITH_BIAS))
        assert said == f"{name}: not with swigluoai"
        if importlib.util.find_spec(name.split("_")[0]) is None and name != "deep_gemm_fp8":
            assert "not installed" in str(
                checked_quantised_peer(ALIGNED, name, weights_of(ALIGNED))
            )


def test_a_run_without_time_stops_and_the_next_one_goes_on(tmp_path: Path) -> None:
    out, names = tmp_path / "gpu.json", ["build", "layer:Mixtral-8x7B"]
    assert run_parts(State.load(out, MACHINE), FakeCard(), names, [], 10) == 4
    assert json.loads(out.read_text())["parts"]["build"]["status"] == "stopped"
    card = FakeCard()
    assert run_parts(State.load(out, MACHINE), card, names, [], 540) == 0
    assert card.calls == ["build"]


def test_what_was_measured_before_a_failure_is_not_measured_again(tmp_path: Path) -> None:
    out, names = tmp_path / "gpu.json", ["layer:gpt-oss-120b"]
    first = FakeCard(measurements=7)
    assert run_parts(State.load(out, MACHINE), first, names, [], 540) == 1
    entry = json.loads(out.read_text())["parts"]["layer:gpt-oss-120b"]
    assert entry["status"] == "failed" and "fell off the bus" in entry["error"]
    assert len(entry["results"]) == 7
    second = FakeCard()
    assert run_parts(State.load(out, MACHINE), second, names, [], 540) == 0
    assert not set(first.measured) & set(second.measured)
    entry = json.loads(out.read_text())["parts"]["layer:gpt-oss-120b"]
    assert entry["status"] == "done" and "error" not in entry


def test_done_parts_are_left_alone_unless_asked_again(tmp_path: Path) -> None:
    out = tmp_path / "gpu.json"
    for again, calls in (([], ["tests"]), ([], []), (["tests"], ["tests"])):
        card = FakeCard()
        assert run_parts(State.load(out, MACHINE), card, ["tests"], again, 540) == 0
        assert card.calls == calls


def test_a_file_of_another_machine_is_not_mixed_up(tmp_path: Path) -> None:
    out = tmp_path / "gpu.json"
    State.load(out, MACHINE).finish("build", "done", 1.0)
    with pytest.raises(ValueError, match="another name; move it away, or give --out"):
        State.load(out, {**MACHINE, "name": "Other"})
    out.write_text("{")
    with pytest.raises(ValueError, match="not a results file"):
        State.load(out, MACHINE)


def test_every_ceiling_has_a_name_without_a_gpu() -> None:
    ada, hopper = (probes.ceilings(SimpleNamespace(major=m, minor=9 * (m == 8))) for m in (8, 9))
    assert {"copy_tb_per_s", "read_tb_per_s", "mma_sync_bf16_tflops"} <= {*ada}
    assert {*hopper} - {*ada} == {"wgmma_bf16_tflops"}


@pytest.mark.parametrize(("major", "minor"), [(8, 9), (9, 0)])
def test_the_probe_compiles(major: int, minor: int, tmp_path: Path) -> None:
    nvcc = os.environ.get("CUDACXX") or shutil.which("nvcc")
    if nvcc is None:
        pytest.skip("nvcc is not installed")
    command = [nvcc, *probes.flags(major, minor), "-cubin", str(probes.PROBE)]
    done = subprocess.run(
        [*command, "-Xptxas=-v", "-o", str(tmp_path / "probe.cubin")],
        capture_output=True, text=True, timeout=240,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "serialized" not in done.stderr  # wgmma, one after the other
    assert len(re.findall(" 0 bytes spill stores", done.stderr)) == (3 if major == 9 else 2)


SMALL = Shape("small", 96, 64, 5, 2)
SMALL_WITH_BIAS = Shape("small with bias", 96, 64, 5, 2, activation="swigluoai", bias=True)


def weights_of(shape: Shape) -> Problem:
    e, h, i = shape.num_experts, shape.hidden_size, shape.intermediate_size
    nothing, bias = torch.empty(0), shape.bias
    return Problem(
        nothing, nothing, nothing,
        torch.randn(e, 2 * i, h).bfloat16() / h**0.5, torch.randn(e, h, i).bfloat16() / i**0.5,
        torch.randn(e, 2 * i) if bias else None, torch.randn(e, h) if bias else None,
        shape.activation, interleaved=bias,
    )  # fmt: skip


@pytest.mark.parametrize("name", ["hf_grouped_mm", "hf_batched_mm"])
@pytest.mark.parametrize("shape", [SMALL, SMALL_WITH_BIAS], ids=lambda s: s.name)
def test_a_peer_is_right_before_it_is_timed(name: str, shape: Shape) -> None:
    torch.manual_seed(0)
    weights = weights_of(shape)
    assert checked_peer(shape, name, weights) is not None
    wrong = replace(weights, activation="gelu_tanh")  # what the peer does not compute
    with pytest.raises(RuntimeError, match=f"{name} on small.*: relative error"):
        checked_peer(shape, name, wrong)


def test_peers_that_are_not_there_or_do_not_know_the_layer_are_left_out() -> None:
    assert checked_peer(SMALL_WITH_BIAS, "triton_fused_moe", weights_of(SMALL_WITH_BIAS)) is None
    if importlib.util.find_spec("vllm") is None:
        assert checked_peer(SMALL, "vllm_fused_experts", weights_of(SMALL)) is None


def test_the_triton_peer_is_right_in_tritons_interpreter() -> None:
    if importlib.util.find_spec("triton") is None:
        pytest.skip("triton is not installed")
    done = subprocess.run(
        [sys.executable, "-c", TRITON_ON_A_CPU], cwd=ROOT / "bench", capture_output=True,
        text=True, timeout=240, env={**os.environ, "TRITON_INTERPRET": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr


TRITON_ON_A_CPU = """
import torch
from gpu_check.triton_moe import fused_moe

torch.manual_seed(0)
SHAPES = (3, 5, 2, 72, 40), (40, 1, 1, 64, 64), (70, 2, 2, 80, 96)
for tokens, experts, top_k, hidden, inner in SHAPES:
    x = torch.randn(tokens, hidden)  # the interpreter multiplies the bits of bf16
    w13 = torch.randn(experts, 2 * inner, hidden) / hidden**0.5
    w2 = torch.randn(experts, hidden, inner) / inner**0.5
    ids, weights = torch.randint(experts, (tokens, top_k)), torch.rand(tokens, top_k)
    expected = torch.zeros(tokens, hidden)
    for t in range(tokens):
        for k in range(top_k):
            gate, up = (w13[ids[t, k]] @ x[t]).chunk(2)
            h = torch.nn.functional.silu(gate) * up
            expected[t] += weights[t, k] * (w2[ids[t, k]] @ h)
    error = (fused_moe(x, ids, weights, w13, w2) - expected).norm() / expected.norm()
    assert error < 1e-4, (tokens, float(error))
"""


@pytest.mark.parametrize("format", [f for f in parts.FORMATS if f not in ("bf16-rows", "fp8 fast")])
def test_random_packed_weights_are_as_large_as_real_ones(format: str) -> None:
    f, hidden, inner, experts = get_format(format), 328, 72, 2
    scale = scale_type_of(f)
    group = 0 if f.base == "bf16" else f.group_size
    sizes = packed_bytes(format, hidden, inner)
    w13, w2 = (
        [random_blob(f.base, scale, group, f.asymmetric, k, size, "cpu") for _ in range(experts)]
        for k, size in zip((hidden, inner), sizes, strict=True)
    )
    aligned = [[_aligned(blob) for blob in blobs] for blobs in (w13, w2)]
    packed = ey.PackedExperts.from_blobs(Blobs(f, scale, hidden, inner, *aligned))
    ids = torch.zeros(3, 1, dtype=torch.int64)
    out = ey.moe_experts(torch.randn(3, hidden).bfloat16(), ids, torch.ones(3, 1), packed)
    assert 0.1 < float(out.float().std()) < 1


def _aligned(blob: torch.Tensor) -> torch.Tensor:
    room = torch.empty(blob.numel() + 64, dtype=torch.uint8)
    begin = -room.data_ptr() % 64
    return room[begin : begin + blob.numel()].copy_(blob)
