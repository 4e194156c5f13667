# SPDX-License-Identifier: Apache-2.0
"""A model that runs: experts move between steps, policies, statistics, deferral, the soak."""

import gc
import json
import random
import time
from typing import Any

import pytest

pytest.importorskip("transformers")

import torch
from transformers import AutoModelForCausalLM

import expertyard as ey
from expertyard import virtual
from expertyard.errors import ConfigError, PlanError
from expertyard.hf import deferral_error, layers_of
from expertyard.models import tiny_moe
from expertyard.plan import make_plan
from hf_families import greedy, logits, prompts, tiny_model

SPLIT = {"layers": "0:2;1:2", "gpu_experts": 6}


@pytest.fixture(autouse=True)
def two_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(virtual.COUNT, "2")


def load(dtype: torch.dtype = torch.float32, **config: Any) -> Any:
    return AutoModelForCausalLM.from_pretrained(
        tiny_moe(), dtype=dtype, quantization_config=ey.ExpertsConfig(**SPLIT, **config)
    ).eval()


def ids(text: bytes = b"If you want to") -> torch.Tensor:
    return torch.tensor([[256, *text]])


def generate(model: Any, tokens: int = 40) -> torch.Tensor:
    with torch.no_grad():
        out: torch.Tensor = model.generate(ids(), max_new_tokens=tokens, do_sample=False)
    return out


@pytest.fixture(scope="module")
def text() -> torch.Tensor:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(virtual.COUNT, "2")
        return generate(load())


def test_experts_move_while_a_model_generates(text: torch.Tensor) -> None:
    model = load()
    chance = random.Random(0)

    class Mover:
        def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
            device = chance.choice(["cpu", "cuda:0", "cuda:1"])
            ey.move(model, chance.randrange(4), chance.randrange(16), device)
            return scores

    with torch.no_grad():
        out = model.generate(ids(), max_new_tokens=40, do_sample=False, logits_processor=[Mover()])
    assert torch.equal(out, text)
    ey.verify(model)  # what was moved is where it was moved to
    assert any(layer.moved for layer in layers_of(model).values())


def test_verify_sees_an_expert_that_nobody_moved() -> None:
    model = load()
    layer = layers_of(model)[2]
    layer.move(0, "cpu")
    layer.moved.clear()
    with pytest.raises(ey.ExpertyardError, match="the plan says cuda:1, its expert 0 is on cpu"):
        ey.verify(model)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ((9, 0, "cpu"), r"one of the layers \[0, 1, 2, 3\], got 9"),
        ((0, 16, "cpu"), "an expert from 0 to 15"),
        ((0, 0, "cuda:7"), "one of cuda:0, cuda:1, cpu, got 'cuda:7'"),
    ],
)
def test_a_wrong_move_is_a_sentence(arguments: tuple[Any, ...], sentence: str) -> None:
    with pytest.raises(PlanError, match=sentence):
        ey.move(load(), *arguments)


@pytest.mark.parametrize("policy", ["lru", "frequency"])
def test_policies_fill_the_slots_that_the_plan_gave(policy: str, text: torch.Tensor) -> None:
    gc.collect()
    model = load(policy=policy)
    layers = layers_of(model)
    slots = {
        n: sum(len(p.packed.here()) for p in x.parts if not p.is_cpu) for n, x in layers.items()
    }
    gpus = virtual.gpu("cuda:0"), virtual.gpu("cuda:1")
    used = [gpu.used for gpu in gpus if gpu]
    assert torch.equal(generate(model), text)
    assert sum(layer.after.moves for layer in layers.values()) > 0
    for number, layer in layers.items():
        on_gpu = sum(len(p.packed.here()) for p in layer.parts if not p.is_cpu)
        assert on_gpu == slots[number] == 6
    gc.collect()
    assert [gpu.used for gpu in gpus if gpu] == used
    ey.verify(model)


def test_the_off_switch_is_bit_identical() -> None:
    """A static model, one whose policy was switched off, and one that is recorded."""
    static = load(torch.bfloat16)
    switched = load(torch.bfloat16, policy="lru")
    ey.set_policy(switched, "static")
    with torch.no_grad():
        expected = static(ids()).logits
        assert torch.equal(switched(ids()).logits, expected)
        with ey.recording(static):
            assert torch.equal(static(ids()).logits, expected)
    with pytest.raises(ConfigError, match="Did you mean 'static'"):
        load(policy="sttic")


def test_what_was_recorded_is_what_plan_reads(tmp_path: Any) -> None:
    model = load()
    with ey.recording(model) as record:
        generate(model, 20)
    trace, profile = tmp_path / "trace.json", tmp_path / "profile.json"
    record.save(trace)
    record.traces = False
    record.save(profile)
    tokens = len(record.tokens())
    assert tokens == ids().shape[1] + 19
    assert {sum(row) for row in record.counts().values()} == {2 * tokens}
    assert json.loads(trace.read_text())["counts"] == json.loads(profile.read_text())["counts"]
    spec = ey.ModelSpec.from_folder(tiny_moe())
    for file, strategy in ((trace, "trace"), (trace, "frequency"), (profile, "frequency")):
        request = ey.Request(gpu_experts=4, strategy=strategy, profile=str(file))
        plan = make_plan(spec, request, None)
        chosen = {
            (layer.layer, e)
            for layer in plan.layers
            for group in layer.experts or ()
            if group.device != "cpu"
            for e in group.ids
        }
        ranked = sorted(
            ((n, layer, e) for layer, row in record.counts().items() for e, n in enumerate(row)),
            reverse=True,
        )
        least = ranked[15][0]
        assert all(record.counts()[layer][e] >= least for layer, e in chosen)
    request = ey.Request(gpu_experts=4, strategy="trace", profile=str(trace))
    codes = {finding.code for finding in make_plan(spec, request, None).findings}
    assert "trace-replay" in codes


def test_deferral_is_off_by_default_and_says_its_error(text: torch.Tensor) -> None:
    model = load(defer=1)
    sentence = deferral_error(model, ids(b"The function returns a list of"))
    assert "the likeliest token is the same at" in sentence
    divergence = float(sentence.rpartition(" ")[2])
    assert 0 < divergence < 1
    assert not torch.equal(generate(model), text), "something was deferred"
    with torch.no_grad():  # a call of many tokens defers nothing
        exact = load()(ids(b"x" * 40)).logits
        torch.testing.assert_close(model(ids(b"x" * 40)).logits, exact, rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("family", ["gpt_oss", "deepseek_v3", "qwen2_moe"])
def test_attach_obeys_a_plan_that_parts_layers(family: str) -> None:
    model = tiny_model(family)
    model.set_experts_implementation("eager")
    expected, tokens = logits(model, prompts()), greedy(model, prompts())
    ey.attach(model, ey.ExpertsConfig(layers="0:1;1:1", gpu_experts="0,3"))
    devices = {row.device for row in ey.verify(model).layers}
    assert devices >= {"cpu", "cuda:1"}
    torch.testing.assert_close(logits(model, prompts()), expected, rtol=1e-5, atol=1e-5)
    assert torch.equal(greedy(model, prompts()), tokens)
    layer = max(layers_of(model))
    ey.move(model, layer, 1, "cuda:0")
    torch.testing.assert_close(logits(model, prompts()), expected, rtol=1e-5, atol=1e-5)
    ey.verify(model)
    model.set_experts_implementation("eager")
    assert torch.equal(logits(ey.detach(model), prompts()), expected)


def resident_bytes() -> int:
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * 4096


def soak(steps: int) -> str:
    """Decode steps with random moves; memory flat, every step's logits those of the static run."""
    moving, static = load(), load()
    chance = random.Random(1)
    token, caches, resident, moves, worst = ids()[:, :1], None, [], 0, 0.0
    most = moving.config.max_position_embeddings
    before = [gpu.used for gpu in (virtual.gpu("cuda:0"), virtual.gpu("cuda:1")) if gpu]
    begin = time.perf_counter()
    for step in range(steps):
        if step % (most // 2) == 0:
            caches = [None, None]
        layer, expert = chance.randrange(4), chance.randrange(16)
        device = chance.choice(["cpu", "cuda:0", "cuda:1"])
        moves += layers_of(moving)[layer].part_of(expert).device != device
        ey.move(moving, layer, expert, device)
        with torch.inference_mode():
            outs = [
                model(token, past_key_values=cache, use_cache=True)
                for model, cache in zip((moving, static), caches, strict=True)
            ]
        caches = [out.past_key_values for out in outs]
        torch.testing.assert_close(outs[0].logits, outs[1].logits, rtol=1e-4, atol=1e-4)
        worst = max(worst, float((outs[0].logits - outs[1].logits).abs().max()))
        token = outs[1].logits[:, -1].argmax(-1, keepdim=True)
        assert torch.equal(token, outs[0].logits[:, -1].argmax(-1, keepdim=True))
        if step % (steps // 10) == 0:
            gc.collect()
            resident.append(resident_bytes())
    seconds = time.perf_counter() - begin
    half = len(resident) // 2
    assert max(resident[half:]) - max(resident[:half]) < 16 << 20, resident
    ey.verify(moving)
    for number, layer_experts in layers_of(moving).items():  # and back to where they were
        for expert in range(16):
            layer_experts.move(expert, layers_of(static)[number].part_of(expert).device)
    gc.collect()
    after = [gpu.used for gpu in (virtual.gpu("cuda:0"), virtual.gpu("cuda:1")) if gpu]
    assert after == before, "memory of GPUs"
    mib = ", ".join(f"{size / 2**20:.1f}" for size in resident)
    return (
        f"{steps} steps, {moves} moves, {seconds:.0f} s; largest difference of logits {worst:.1g}; "
        f"resident MiB at each tenth: {mib}"
    )


def test_a_short_soak() -> None:
    soak(100)


@pytest.mark.slow
def test_ten_thousand_steps_with_random_moves() -> None:
    print(soak(10_000))  # docs/dispatch.md quotes it
