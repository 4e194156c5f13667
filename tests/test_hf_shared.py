# SPDX-License-Identifier: Apache-2.0
"""Shared experts run while the CPU computes its part of the routed ones: the same numbers, at the
same time, and only in blocks whose source allows it."""

import copy
import importlib
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("transformers")

import torch
from torch import nn

import expertyard as ey
from expertyard import virtual
from expertyard.dispatch import layer as layer_module
from expertyard.dispatch import tracing
from expertyard.errors import DeviceError, KernelError
from expertyard.hf import layers_of
from expertyard.hf.shared import SWITCH, SharedExperts, SharedForm, read_block
from hf_families import greedy, load, logits, prompts, save, tiny_model

FIRST, AFTER = "qwen2_moe", "deepseek_v3"  # shared experts before the routed ones, and after
FAMILIES = [FIRST, AFTER, "glm4_moe"]
WAIT = 20  # seconds; far more than anything here takes


@pytest.fixture(autouse=True)
def one_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(virtual.COUNT, "1")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("shared")
    return {family: save(tiny_model(family), root / family) for family in FAMILIES}


def on_gpu(folder: Path, *, gpu_experts: int = 0, dtype: Any = torch.float32) -> Any:
    """Layers on cuda:0, and of each layer's experts so many; the others on the CPU."""
    config = ey.ExpertsConfig(layers="0:2", gpu_experts=gpu_experts)
    return load(folder, dtype=dtype, quantization_config=config)


def shared_of(model: Any) -> list[SharedExperts]:
    found = (getattr(module, "meanwhile", None) for module in model.modules())
    return [meanwhile.__self__ for meanwhile in found if meanwhile is not None]


class Meeting:
    """The shared experts and the CPU's part wait for each other at the begin and at the end, so
    that either both are at work at once or the wait runs out."""

    def __init__(self, model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        self.met = 0
        self._doors = [threading.Barrier(2), threading.Barrier(2)]
        self._both(monkeypatch, layer_module, "moe_parts")
        for shared in shared_of(model):
            self._both(monkeypatch, type(shared.shared), "forward")
            break  # one class

    def _both(self, monkeypatch: pytest.MonkeyPatch, owner: Any, name: str) -> None:
        real = getattr(owner, name)

        def meet(*args: Any, **kwargs: Any) -> Any:
            if threading.current_thread() is threading.main_thread() and name == "moe_parts":
                return real(*args, **kwargs)  # not beside anything
            self._doors[0].wait(WAIT)
            out = real(*args, **kwargs)
            self.met += name == "forward"
            self._doors[1].wait(WAIT)
            return out

        monkeypatch.setattr(owner, name, meet)


@pytest.mark.parametrize("gpu_experts", [0, 3])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_numbers_are_those_of_one_after_the_other(
    family: str, gpu_experts: int, folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(SWITCH, "0")
    plain = on_gpu(folders[family], gpu_experts=gpu_experts)
    monkeypatch.setenv(SWITCH, "1")
    model = on_gpu(folders[family], gpu_experts=gpu_experts)
    assert not shared_of(plain) and len(shared_of(model)) == len(layers_of(model))
    expected = greedy(plain, prompts())
    with virtual.Guard("cuda:0"):
        assert torch.equal(greedy(model, prompts()), expected)
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            a, b = (m(**prompts()).logits for m in (plain, model))
        assert torch.equal(a, b), mode
    assert not any(shared.off or shared._calls for shared in shared_of(model))


@pytest.mark.parametrize("family", [FIRST, AFTER])
def test_both_are_at_work_at_the_same_time(
    family: str, folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = on_gpu(folders[family])
    expected = logits(model, prompts())  # the first call shows what comes out, one after the other
    made = shared_of(model)
    forward = type(made[0].shared).forward
    monkeypatch.setattr(made[0], "off", False)
    with tracing() as tracer, monkeypatch.context() as patch:
        meeting = Meeting(model, patch)
        dense = [m for m in model.modules() if type(m) is type(made[0].shared)]
        for module in dense:  # dense layers of the same class have nobody to meet
            if module not in [shared.shared for shared in made]:
                patch.setattr(module, "forward", forward.__get__(module), raising=False)
        got = logits(model, prompts())
    assert torch.equal(got, expected)
    assert meeting.met == len(made)
    spans = {(name, device): (begin, end) for name, device, begin, end, _ in tracer.spans}
    for number in layers_of(model):
        begin, end = spans[f"layer {number} shared experts", "cuda:0"]
        cpu = spans[f"layer {number}", "cpu"]
        assert begin < cpu[0] < cpu[1] < end
    assert tracer.together() == 1.0


@pytest.mark.parametrize("family", [FIRST, AFTER])
@pytest.mark.parametrize("who", ["shared", "cpu"])
def test_an_error_of_either_is_the_calls_and_the_next_call_is_right(
    family: str, who: str, folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = on_gpu(folders[family])
    expected = logits(model, prompts())
    ended = threading.Event()
    real = layer_module.moe_parts

    def parts(*args: Any, **kwargs: Any) -> Any:
        if who == "cpu":
            raise DeviceError("cpu: it fails.")
        out = real(*args, **kwargs)
        ended.set()
        return out

    def fails(*args: Any) -> Any:
        raise KernelError("shared: they fail.")

    with monkeypatch.context() as patch:
        patch.setattr(layer_module, "moe_parts", parts)
        if who == "shared":
            for shared in shared_of(model):
                patch.setattr(shared, "_compute", fails)
        with pytest.raises((DeviceError, KernelError), match=f"{who}: "):
            logits(model, prompts())
    assert who == "cpu" or ended.is_set(), "the CPU's part has ended when the call has"
    assert not any(shared._calls for shared in shared_of(model))
    assert torch.equal(logits(model, prompts()), expected)


@pytest.mark.parametrize("family", [FIRST, AFTER])
def test_experts_that_move_turn_it_on_and_off(family: str, folders: dict[str, Path]) -> None:
    model = on_gpu(folders[family])
    expected = logits(model, prompts())
    for device in ("cuda:0", "cpu"):
        for number, experts in layers_of(model).items():
            for expert in range(experts.num_experts):
                ey.move(model, number, expert, device)
            assert experts.overlaps == (device == "cpu")
        torch.testing.assert_close(logits(model, prompts()), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", [FIRST, AFTER])
def test_a_copy_of_the_model_has_its_own(family: str, folders: dict[str, Path]) -> None:
    model = on_gpu(folders[family])
    twin = copy.deepcopy(model)
    expected = logits(model, prompts())
    for ours, theirs in zip(shared_of(model), shared_of(twin), strict=True):
        assert theirs.shared is not ours.shared and theirs.block in list(twin.modules())
        with torch.no_grad():
            for parameter in ours.shared.parameters():
                parameter.zero_()
    assert torch.equal(logits(twin, prompts()), expected)
    assert not torch.equal(logits(model, prompts()), expected)


def test_layers_on_the_cpu_and_gradients_are_left_alone(folders: dict[str, Path]) -> None:
    model = load(folders[AFTER], quantization_config=ey.ExpertsConfig(layers="0:1"))
    homes = {number: experts.home for number, experts in layers_of(model).items()}
    assert homes == {1: "cpu"} and not shared_of(model)
    model = on_gpu(folders[FIRST])
    (*_, last) = shared_of(model)
    with torch.enable_grad():
        out = model(**prompts()).logits
    assert out.requires_grad and not last._dtypes, "computed by the block's own call"


class Argument(nn.Module):
    """Passes something else than what its source says, by a property that the source hides."""

    def __init__(self, experts: Any, shared: nn.Module) -> None:
        super().__init__()
        self.experts, self.shared_experts = experts, shared

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        residuals = self.change(x)
        out = self.experts(x)
        return out + self.shared_experts(residuals)

    def change(self, x: torch.Tensor) -> torch.Tensor:
        return x * 2


def test_an_argument_that_is_not_the_one_foreseen_is_computed_with() -> None:
    class Experts(nn.Module):
        overlaps, made = True, None

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            if self.made is not None and (work := self.made.meanwhile()) is not None:
                work()
            return x

    experts, shared = Experts(), nn.Linear(4, 4)
    experts.__dict__["experts"] = experts
    block = Argument(experts, shared).eval()
    form = read_block(block, "experts")
    assert form == SharedForm("shared_experts", first=False, rows=False)
    made = SharedExperts(block, shared, experts, form)  # type: ignore[arg-type]
    experts.__dict__["made"] = made
    x = torch.randn(3, 4)
    with torch.no_grad():
        expected = block(x)
        block.__dict__["forward"], shared.__dict__["forward"] = made.of_block, made.of_shared
        assert torch.equal(block(x), expected) and made.off


def sources() -> Iterator[Any]:
    for family, name, form in (
        ("deepseek_v3", "DeepseekV3MoE", SharedForm("shared_experts", False, False)),
        ("glm4_moe", "Glm4MoeMoE", SharedForm("shared_experts", False, False)),
        ("llama4", "Llama4TextMoe", SharedForm("shared_expert", False, True)),
        ("nemotron_h", "NemotronHMoE", SharedForm("shared_experts", False, False)),
        ("qwen2_moe", "Qwen2MoeSparseMoeBlock", SharedForm("shared_expert", True, True)),
        ("qwen3_next", "Qwen3NextSparseMoeBlock", SharedForm("shared_expert", True, True)),
        ("ernie4_5_moe", "Ernie4_5_MoeSparseMoeBlock", SharedForm("shared_experts", True, True)),
        ("hunyuan_v1_moe", "HunYuanMoEV1Moe", SharedForm("shared_mlp", True, False)),
    ):
        yield pytest.param(family, name, form, id=family)


@pytest.mark.parametrize(("family", "name", "form"), sources())
def test_families_blocks_are_understood(family: str, name: str, form: SharedForm) -> None:
    module = importlib.import_module(f"transformers.models.{family}.modeling_{family}")
    assert read_block(with_shared(getattr(module, name), form.name), "experts") == form


def with_shared(kind: type, name: str = "shared_experts") -> nn.Module:
    block = kind.__new__(kind)
    nn.Module.__init__(block)
    block._modules[name] = nn.Linear(1, 1)
    return block


class LooksAtIt(nn.Module):
    def forward(self, x: Any) -> Any:
        shared = self.shared_experts(x)
        if shared.isnan().any():
            return x
        out = self.experts(x)
        return out + shared


class MayNotRunExperts(nn.Module):
    def forward(self, x: Any) -> Any:
        shared = self.shared_experts(x)
        if x.shape[0]:
            x = self.experts(x)
        return x + shared


class MayNotRunExpertsEither(nn.Module):
    def forward(self, x: Any) -> Any:
        shared = self.shared_experts(x)
        out = self.experts(x) if x.shape[0] else x
        return out + shared


class ChangesIt(nn.Module):
    def forward(self, x: Any) -> Any:
        out = self.experts(x)
        x.mul_(2)
        return out + self.shared_experts(x)


class WritesInto(nn.Module):
    def forward(self, x: Any) -> Any:
        shared = self.shared_experts(x)
        x[0] = 0
        out = self.experts(x)
        return out + shared


class AddsAtOnce(nn.Module):
    def forward(self, x: Any) -> Any:
        return self.shared_experts(x) + self.experts(x)


class Scales(nn.Module):
    def forward(self, x: Any) -> Any:
        shared = self.shared_experts(x) * 2
        return shared + self.experts(x)


class HasNone(nn.Module):
    def forward(self, x: Any) -> Any:
        return self.experts(x)


@pytest.mark.parametrize(
    "kind",
    [
        LooksAtIt,
        MayNotRunExperts,
        MayNotRunExpertsEither,
        ChangesIt,
        WritesInto,
        AddsAtOnce,
        Scales,
        HasNone,
    ],
)
def test_blocks_that_do_not_wait_are_left_alone(kind: type) -> None:
    assert read_block(with_shared(kind), "experts") is None
