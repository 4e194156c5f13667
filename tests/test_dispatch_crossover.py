# SPDX-License-Identifier: Apache-2.0
"""The crossover between CPU and weights that are brought is measured when a model is loaded: once,
in little time, and without a word where it cannot be."""

import json
import time
import warnings
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("transformers")

import torch
from transformers import AutoModelForCausalLM

import expertyard as ey
from expertyard import virtual
from expertyard.dispatch import crossover, explain
from expertyard.errors import ConfigError, DeviceError
from expertyard.hf import layers_of
from expertyard.models import tiny_moe

# seconds of a call of so many tokens: the CPU's grow with them, the GPU's hardly do
CPU, GPU = (lambda t: t * 1e-4), (lambda t: 9e-3 + t * 1e-6)


@pytest.fixture(autouse=True)
def file(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.setenv(virtual.COUNT, "1")
    monkeypatch.setenv(crossover.MEASURE, "always")
    monkeypatch.setattr(crossover, "_here", {})
    monkeypatch.setattr(crossover, "_said", set())
    path = tmp_path / "deep" / "crossovers.json"
    monkeypatch.setenv(crossover.FILE, str(path))
    return path


class Clock:
    """Time that passes by what is measured only."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, cpu: Any = CPU, gpu: Any = GPU) -> None:
        self.now, self.calls = 0.0, 0
        self.asked: list[tuple[str, int]] = []
        monkeypatch.setattr(crossover.time, "perf_counter", lambda: self.now)
        monkeypatch.setattr(crossover, "multiply", lambda p, op, h, *_: self._pass("cpu", cpu, h))
        monkeypatch.setattr(crossover, "_on_gpu", lambda p, g, s, h, *_: self._pass("gpu", gpu, h))

    def _pass(self, who: str, seconds: Any, hidden: torch.Tensor) -> None:
        self.asked.append((who, hidden.shape[0]))
        self.now += seconds(hidden.shape[0])


def load(**config: Any) -> Any:
    given = {"layers": "0:4", "gpu_experts": 8, **config}
    return AutoModelForCausalLM.from_pretrained(
        tiny_moe(), quantization_config=ey.ExpertsConfig(**given)
    ).eval()


def said(model: Any) -> str:
    return "\n".join(explain(layers_of(model)))


def test_loading_measures_once_for_all_layers_of_a_shape_and_keeps_it(
    file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = Clock(monkeypatch)
    assert "from 128 tokens a call their weights are brought to cuda:0" in said(load())
    ((key, entry),) = json.loads(file.read_text()).items()
    assert "virtual" in key and "8x" in key
    assert entry["tokens"] == 128 and entry["quick"] is True
    assert [int(tokens) for tokens in entry["seconds"]] == [32, 64, 128]
    assert sorted(p.name for p in file.parent.iterdir()) == [file.name], "nothing is left behind"
    asked = len(clock.asked)
    crossover._here.clear()  # another process
    again = said(load())
    assert len(clock.asked) == asked and "measured at load" in again
    assert "from 128 tokens" in again


def test_real_calls_are_measured_and_give_the_same_logits(file: Path) -> None:
    begin = time.perf_counter()
    model = load()
    assert "measured at load" in said(model)
    (entry,) = json.loads(file.read_text()).values()
    assert all(0 < s < 60 for pair in entry["seconds"].values() for s in pair)
    assert time.perf_counter() - begin < 120
    ids = torch.tensor([[256, *b"The function returns a list of all the"]])
    for layer in layers_of(model).values():
        (part,) = (p for p in layer.parts if p.is_cpu)
        part.stream_from = 8
        layer._arrange()
    with torch.no_grad():
        got = model(ids).logits
    expected = load(layers="0:0", gpu_experts=None)
    with torch.no_grad():
        torch.testing.assert_close(got, expected(ids).logits, rtol=0, atol=0.25)  # bfloat16


def test_what_takes_too_long_is_drawn_on(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """CPU: 2 ms a token; GPU: 0.512 s whatever comes. They meet at 256; the time ends before."""
    clock = Clock(monkeypatch, lambda t: t * 2e-3, lambda t: 0.512)
    model = load()
    assert clock.now < crossover.SECONDS + 0.6
    (entry,) = json.loads(file.read_text()).values()
    assert max(map(int, entry["seconds"])) < 256 and entry["tokens"] == 256
    assert "from 256 tokens" in said(model)


@pytest.mark.parametrize(
    ("cpu", "gpu"), [(lambda t: 1e-6 * t, lambda t: 1e-3 * t), (lambda t: 0.2, lambda t: 0.3)]
)
def test_where_the_gpu_never_wins_weights_stay(
    cpu: Any, gpu: Any, file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Clock(monkeypatch, cpu, gpu)
    assert "for any number of tokens (measured at load)" in said(load())
    (entry,) = json.loads(file.read_text()).values()
    assert entry["tokens"] is None


def test_without_time_for_two_calls_the_rule_of_thumb_holds(
    file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = Clock(monkeypatch, lambda t: 1.5, lambda t: 1.9)
    assert "rule of thumb" in said(load())
    assert not file.exists() and len(clock.asked) <= 3
    monkeypatch.setattr(crossover, "LINK", 1.0)  # byte a second
    clock.asked.clear()
    assert "rule of thumb" in said(load())
    assert not clock.asked, "what is foreseen to take too long is not begun"


@pytest.mark.parametrize("setting", ["never", "auto", ""])
def test_it_can_be_left_out_and_virtual_gpus_are_left_out(
    setting: str, file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(crossover.MEASURE, setting)
    clock = Clock(monkeypatch)
    assert "rule of thumb" in said(load())
    assert not file.exists() and not clock.asked


def test_a_wrong_setting_is_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(crossover.MEASURE, "nevr")
    with pytest.raises(ConfigError, match=r"EXPERTYARD_MEASURE: expected auto, .*, got 'nevr'"):
        load()


def test_rules_and_earlier_measurements_are_not_questioned(
    file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = load()
    patient = Clock(monkeypatch, lambda t: t * 1e-4, lambda t: 3e-3)
    for layer in layers_of(model).values():
        crossover.measure(layer)
    asked = len(patient.asked)
    assert "from 32 tokens" in said(load()) and "(measured)" in said(load())
    assert len(patient.asked) == asked
    file.unlink()
    crossover._here.clear()
    everything_on_the_gpu = load(gpu_experts=None)
    assert len(patient.asked) == asked, "there are no experts on the CPU"
    assert "for any number of tokens" in said(everything_on_the_gpu)


@pytest.mark.parametrize("what", ["a file in the way", "not ours"])
def test_a_home_that_cannot_be_written_is_a_warning_and_what_was_found_holds(
    what: str, file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """chmod does not stop root, who runs the tests: a file stands where the folder would be."""
    if what == "not ours":
        file.parent.mkdir()
        file.write_text("{ not json")
    else:
        file.parent.write_text("")
    clock = Clock(monkeypatch)
    sentence = "Delete the file" if what == "not ours" else "What was measured is not kept"
    with pytest.warns(UserWarning, match=rf"crossovers\.json: .*{sentence}"):
        assert "from 128 tokens" in said(load())
    asked = len(clock.asked)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert "from 128 tokens" in said(load()), "by this process"
    assert len(clock.asked) == asked and not [w for w in caught if "measured" in str(w.message)]
    if what == "not ours":
        assert file.read_text() == "{ not json"


@pytest.mark.parametrize(
    ("kind", "words"),
    [(torch.OutOfMemoryError, "no room for 5 bytes."), (DeviceError, "cuda:0: it hangs.")],
)
def test_a_measurement_that_fails_does_not_stop_the_load(
    kind: type[Exception], words: str, file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*args: Any) -> None:
        raise kind(words)  # made here: one of the parameters would keep the model in its traceback

    monkeypatch.setattr(crossover, "_on_gpu", fails)
    with pytest.warns(UserWarning, match=f"could not be measured .{words[:12]}"):
        model = load()
    assert "rule of thumb" in said(model) and not file.exists()


def test_half_a_file_is_never_seen(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    crossover._write("a", {"tokens": 5})

    def full(self: Path, *args: Any, **kwargs: Any) -> None:
        self.write_bytes(b'{"a"')
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(ConfigError, match=r"crossovers\.json: cannot be written \(No space left"):
        crossover._write("b", {"tokens": 6})
    assert json.loads(file.read_text()) == {"a": {"tokens": 5}}
    assert [p.name for p in file.parent.iterdir()] == [file.name]
