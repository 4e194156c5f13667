# SPDX-License-Identifier: Apache-2.0
"""A layer in parts computes what one device computes; errors and time-outs surface as sentences."""

import copy
import dataclasses
import json
import os
import resource
import threading
import time
from pathlib import Path

import pytest
import torch

from expertyard import virtual
from expertyard.dispatch import (
    LayerExperts,
    PartPlan,
    Placement,
    Prefill,
    RunOptions,
    Tracer,
    build,
    copies,
    crossover,
    lanes,
    measure,
    spread,
    streaming,
    tracing,
)
from expertyard.dispatch import layer as layer_module
from expertyard.dispatch.explain import explain
from expertyard.errors import ConfigError, DeviceError, KernelError, PlanError
from expertyard.native import _C
from expertyard.packing import ExpertPacker
from expertyard.testing import calc_diff, random_problem

SPLIT = {"cuda:0": (0, 1), "cuda:1": (2, 5), "cpu": (3, 4, 6, 7)}


@pytest.fixture(autouse=True)
def two_gpus(monkeypatch):
    monkeypatch.setenv(virtual.COUNT, "2")


def problem(num_tokens=5, format="fp32", dtype=torch.float32, **options):
    return random_problem(
        num_tokens=num_tokens,
        hidden_size=72,
        intermediate_size=40,
        num_experts=8,
        top_k=3,
        format=format,
        hidden_dtype=dtype,
        **options,
    )


def layer(packed, split=SPLIT, home="cuda:0", prefill=None, **options):
    parts = tuple(
        PartPlan(ids, device, packed.format, device.partition(":")[0], "test", prefill)
        for device, ids in split.items()
    )
    made = spread(packed, [(part.ids, part.device) for part in parts])
    return LayerExperts(Placement(home, parts), made, layer=3, options=RunOptions(**options))


def run(experts, p):
    with torch.inference_mode():
        return experts(p.hidden_states, p.topk_ids, p.topk_weights)


@pytest.mark.parametrize("home", ["cpu", "cuda:0", "cuda:1"])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("num_tokens", [0, 1, 7, 300])
def test_parts_add_up(home, bias, interleaved, num_tokens):
    p = problem(num_tokens, bias=bias, interleaved=interleaved)
    out = run(layer(p.pack(), home=home), p)
    assert out.dtype == torch.float32 and calc_diff(out, p.reference()) < 2e-6


def test_parts_are_rounded_once():
    """The sum of bf16 parts would be off by a rounding each; this one is the whole's rounding."""
    p = problem(64, "bf16", torch.bfloat16)
    whole, parts = run(layer(p.pack(), {"cpu": tuple(range(8))}, "cpu"), p), run(layer(p.pack()), p)
    assert (whole != parts).float().mean() < 0.02  # fp32 summation order, at a rounding's edge
    assert calc_diff(parts, p.reference()) < 3.5e-3


@pytest.mark.parametrize("format", ["bf16", "int8", "int4", "fp8", "mxfp4"])
def test_packed_experts_are_spread_and_moved_too(format):
    p = problem(9, "bf16", torch.bfloat16, bias=True)
    packer = ExpertPacker(8, 72, 40, format, has_bias=True)
    for e in range(8):
        gate, up = p.gate_up[e].chunk(2)
        gate_bias, up_bias = p.gate_up_bias[e].chunk(2)
        packer.put(e, gate, up, p.down[e], gate_bias=gate_bias, up_bias=up_bias,
                   down_bias=p.down_bias[e])  # fmt: skip
    packed = packer.finish()
    expected = run(layer(packed, {"cpu": tuple(range(8))}, "cpu"), p)
    experts = layer(packed)
    assert calc_diff(run(experts, p), expected) < 3e-3
    for expert, device in ((0, "cpu"), (7, "cuda:1"), (3, "cuda:0"), (7, "cpu"), (0, "cuda:0")):
        experts.move(expert, device)
    assert calc_diff(run(experts, p), expected) < 3e-3


def test_ids_that_mean_none_and_wrong_ones():
    p = problem()
    p.topk_ids[0, 0], p.topk_ids[1, 1] = -1, 8
    assert calc_diff(run(layer(p.pack()), p), p.reference()) < 2e-6
    p.topk_ids[2, 2] = 9
    with pytest.raises(KernelError, match=r"topk_ids\[2, 2\] is 9"):
        run(layer(p.pack()), p)


def test_wrong_shapes_are_sentences():
    p = problem()
    experts = layer(p.pack())
    for hidden in (p.hidden_states[0], p.hidden_states[:, :-1], p.hidden_states[None]):
        with pytest.raises(KernelError, match="hidden_states: expected"):
            experts(hidden, p.topk_ids, p.topk_weights)
    with pytest.raises(KernelError, match="topk_ids: expected"):
        experts(p.hidden_states, p.topk_ids[:-1], p.topk_weights)


def test_backward_is_a_sentence():
    p = problem()
    hidden = p.hidden_states.clone().requires_grad_()
    out = layer(p.pack())(hidden, p.topk_ids, p.topk_weights)
    with pytest.raises(KernelError, match="has no gradient"):
        out.sum().backward()


def test_a_split_layer_compiles_as_one_graph():
    p = problem()
    experts = layer(p.pack())
    compiled = torch.compile(lambda *a: experts(*a), fullgraph=True, backend="eager")
    with torch.no_grad():
        out = compiled(p.hidden_states, p.topk_ids, p.topk_weights)
    assert torch.equal(out, run(experts, p))


def test_a_copy_is_its_own():
    p = problem()
    experts = layer(p.pack())
    twin = copy.deepcopy(experts)
    expected = run(experts, p)
    experts.move(0, "cpu")
    assert twin.part_of(0).device == "cuda:0" and torch.equal(run(twin, p), expected)


def test_an_error_on_a_device_comes_out():
    """No part is the caller's here: the sentence is the GPUs' own. Then they go on."""
    p = problem()
    expected = p.topk_ids.clone()
    experts = layer(p.pack(), {"cuda:0": (0, 1, 2, 3), "cuda:1": (4, 5, 6, 7)})
    p.topk_ids[2, 2] = 9
    with pytest.raises(KernelError, match=r"topk_ids\[2, 2\] is 9"):
        run(experts, p)
    p.topk_ids.copy_(expected)
    assert calc_diff(run(experts, p), p.reference()) < 2e-6


def test_a_stuck_device_is_a_time_out():
    p = problem()
    experts = layer(p.pack(), timeout=0.2)
    _C.occupy_lane(0, 1.5)
    begin = time.perf_counter()
    with pytest.raises(DeviceError, match=r"cuda:0: its part of layer 3 did not finish within 0.2"):
        run(experts, p)
    with pytest.raises(DeviceError, match="cuda:0: still busy with its part of layer 3"):
        run(experts, p)
    assert time.perf_counter() - begin < 1.2
    time.sleep(max(0, begin + 1.8 - time.perf_counter()))
    assert calc_diff(run(experts, p), p.reference()) < 2e-6, "it has come back"


def test_a_stuck_device_of_a_prefill_is_a_time_out(monkeypatch):
    """The weights are brought by a thread of Python's."""
    prefill = Prefill("cuda:1", "cuda", "r:1")
    p = problem(8)
    experts = layer(p.pack(), {"cpu": tuple(range(8))}, prefill=prefill, prefill_tokens=8,
                    timeout=0.2)  # fmt: skip
    hangs, real = threading.Event(), streaming.multiply

    def slow(*arguments):
        hangs.wait(10)
        return real(*arguments)

    monkeypatch.setattr(streaming, "multiply", slow)
    with pytest.raises(DeviceError, match=r"cuda:1: its part of layer 3 did not finish within 0.2"):
        run(experts, p)
    with pytest.raises(DeviceError, match="cuda:1: still busy with its part of layer 3"):
        run(experts, p)
    hangs.set()
    lanes._lanes.pop("cuda:1")  # a new process, for the tests that follow


def test_a_forked_child_has_lanes_of_its_own():
    p = problem()
    experts = layer(p.pack())
    expected = run(experts, p)
    child = os.fork()
    if child == 0:
        torch.set_num_threads(1)  # torch's own threads do not survive a fork
        os._exit(0 if torch.equal(run(experts, p), expected) else 1)
    assert os.waitpid(child, 0)[1] == 0
    assert torch.equal(run(experts, p), expected)


def test_layers_of_several_threads_take_turns_at_a_lane():
    problems = [dataclasses.replace(problem(n + 1)) for n in range(4)]
    wrong = []

    def work(p):
        experts = layer(p.pack())
        expected = p.reference()
        wrong.extend(n for n in range(50) if calc_diff(run(experts, p), expected) >= 2e-6)

    threads = [threading.Thread(target=work, args=(p,)) for p in problems]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not wrong and not any(thread.is_alive() for thread in threads)


def test_gpu_and_cpu_work_at_the_same_time(tmp_path):
    """In one of many calls: where others want the CPUs, a lane may wake when the rest is done."""
    p = problem(400)
    experts = layer(p.pack())
    run(experts, p)
    overlap = []
    while len(overlap) < 200 and max(overlap, default=0) <= 0:
        with tracing() as trace:
            for _ in range(5):
                run(experts, p)
        trace.save(tmp_path / "trace.json")
        events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
        names = {e["tid"]: e["args"]["name"] for e in events if e["ph"] == "M"}
        assert set(names.values()) == {"cpu", "cuda:0", "cuda:1"}
        spans = [(names[e["tid"]], e["ts"], e["ts"] + e["dur"]) for e in events if e["ph"] == "X"]
        assert len(spans) == 15
        cpu = [s for s in spans if s[0] == "cpu"]
        others = [s for s in spans if s[0] != "cpu"]
        overlap.append(max(min(a[2], b[2]) - max(a[1], b[1]) for a in cpu for b in others))
    assert max(overlap) > 0


def test_a_trace_says_how_long_cpu_and_gpus_work_together():
    tracer = Tracer()
    for device, begin, end in (
        ("cpu", 0, 10), ("cuda:0", 5, 15), ("cuda:1", 6, 8), ("cpu", 14, 18), ("cuda:1", 40, 60),
    ):  # fmt: skip
        tracer.add("x", device, tracer.began + begin * 1000, tracer.began + end * 1000)
    assert tracer.together() == pytest.approx((5 + 1) / 14)
    alone = Tracer()
    alone.add("x", "cpu", alone.began, alone.began + 5)
    assert alone.together() is None


def test_nothing_runs_when_nothing_is_asked():
    """All lanes live, and after a few milliseconds none of them uses the CPU."""
    p = problem(50)
    experts = layer(p.pack())
    for _ in range(20):
        run(experts, p)
    names = {Path(f"/proc/self/task/{t}/comm").read_text() for t in os.listdir("/proc/self/task")}
    assert {"ey cuda:0\n", "ey cuda:1\n"} <= names
    time.sleep(0.1)
    before = resource.getrusage(resource.RUSAGE_SELF)
    time.sleep(1.0)
    after = resource.getrusage(resource.RUSAGE_SELF)
    used = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    assert used < 0.01, f"{100 * used:.2f} % of a CPU"


@pytest.mark.parametrize(
    "prefill", [Prefill("cuda:1", "cuda", "r:1"), Prefill("cuda:0", "torch", "r:1"),
                Prefill("cpu", "torch", "r:1")]
)  # fmt: skip
def test_a_rules_prefill_is_obeyed_by_the_number_of_tokens(prefill, monkeypatch):
    seen = []
    real = streaming.multiply

    def watch(packed, op, *inputs):
        seen.append((op, packed))
        return real(packed, op, *inputs)

    monkeypatch.setattr(streaming, "multiply", watch)  # what stream() calls; decoding does not
    monkeypatch.setattr(streaming, "CHUNK_BYTES", 1)  # an expert at a time
    few = problem(7)
    many = dataclasses.replace(problem(8), gate_up=few.gate_up, down=few.down)
    packed = few.pack()
    experts = layer(packed, {"cpu": tuple(range(8))}, prefill=prefill, prefill_tokens=8)
    assert calc_diff(run(experts, few), few.reference()) < 2e-6
    assert not seen
    assert calc_diff(run(experts, many), many.reference()) < 2e-6
    assert {op for op, _ in seen} == {prefill.op}
    assert len(seen) == (1 if prefill.device == "cpu" else 8), "on the CPU they are there already"
    for _, one in seen:
        gate = one.expert(one.here()[0])[0]
        assert (virtual.marked(gate) or "cpu") == prefill.device
    assert f"brought to {prefill.device}" in explain({3: experts})[0]


PREFILL = Prefill("cuda:1", "cuda", "r:1")


@pytest.mark.parametrize("format", ["fp32", "bf16", "int4-g32"])
@pytest.mark.parametrize("experts_at_once", [1, 3, 8])
def test_weights_that_are_brought_in_chunks_add_up(format, experts_at_once, monkeypatch):
    p = problem(40, "bf16" if format != "fp32" else "fp32", bias=True, interleaved=format == "fp32")
    packed = p.pack()
    if format == "int4-g32":
        packer = ExpertPacker(8, 72, 40, format, has_bias=True)
        for e in range(8):
            gate, up, down, *biases = packed.expert(e)
            packer.put(e, gate, up, down, **dict(zip(BIASES, biases, strict=True)))
        packed = packer.finish()
    p.topk_ids[0, 0], p.topk_ids[1, 1] = -1, 8
    size = streaming._size(packed, 0)
    monkeypatch.setattr(streaming, "CHUNK_BYTES", experts_at_once * size)
    used = virtual.gpu("cuda:1").used
    out = streaming.stream(packed, "cuda:1", "cuda", p.hidden_states, p.topk_ids, p.topk_weights)
    expected = copies.multiply(packed, "cpu", p.hidden_states, p.topk_ids, p.topk_weights)
    assert calc_diff(out, expected) < 2e-6  # the order of float32 sums
    assert virtual.gpu("cuda:1").used == used, "their memory is given back"


BIASES = "gate_bias", "up_bias", "down_bias"


def test_a_wrong_id_is_found_in_chunks_too(monkeypatch):
    monkeypatch.setattr(streaming, "CHUNK_BYTES", 1)
    p = problem(8)
    p.topk_ids[2, 2] = 9
    with pytest.raises(KernelError, match=r"topk_ids\[2, 2\] is 9"):
        run(layer(p.pack(), {"cpu": tuple(range(8))}, prefill=PREFILL, prefill_tokens=8), p)


def test_the_next_chunk_is_on_its_way_while_one_is_computed(monkeypatch):
    monkeypatch.setattr(streaming, "CHUNK_BYTES", 1)
    begun, real_copy, real = [], streaming._Link.bring, streaming.multiply
    changed = threading.Condition()

    def copy(link, number):
        with changed:
            begun.append(number)
            changed.notify_all()
        real_copy(link, number)

    def multiply(*arguments):
        done.append(None)
        with changed:
            wanted = min(len(done), 7)  # chunk `len(done)` comes during arithmetic len(done) - 1
            assert changed.wait_for(lambda: wanted in begun, timeout=20)
            assert max(begun) <= wanted, "two areas hold two chunks"
        return real(*arguments)

    done = []
    monkeypatch.setattr(streaming._Link, "bring", copy)
    monkeypatch.setattr(streaming, "multiply", multiply)
    p = problem(40)
    out = streaming.stream(p.pack(), "cuda:1", "cuda", p.hidden_states, p.topk_ids, p.topk_weights)
    assert calc_diff(out, p.reference()) < 2e-6 and len(done) == 8


@pytest.mark.parametrize("forgotten", ["wait", "used"])
def test_chunks_out_of_order_are_noticed(forgotten, monkeypatch):
    monkeypatch.setattr(streaming, "CHUNK_BYTES", 1)
    monkeypatch.setattr(streaming._VirtualLink, forgotten, lambda link, number: None)
    real = streaming._Link.bring
    monkeypatch.setattr(streaming._Link, "bring", lambda *a: (time.sleep(0.05), real(*a))[1])
    p = problem(40)
    inputs = p.hidden_states, p.topk_ids, p.topk_weights
    if forgotten == "used":
        with pytest.raises(DeviceError, match=r"chunk 2 of weights .* came too early"):
            streaming.stream(p.pack(), "cuda:1", "cuda", *inputs)
    else:
        assert streaming.stream(p.pack(), "cuda:1", "cuda", *inputs).isnan().any()


class FakeCuda:
    """Streams and events that write down what is queued, on tensors of the CPU."""

    def __init__(self, monkeypatch):
        self.log, self.inside = [], "current"
        empty = torch.empty
        monkeypatch.setattr(
            torch, "empty", lambda *a, pin_memory=False, **k: empty(*a, **k).fill_(255)
        )
        monkeypatch.setattr(torch.cuda, "Stream", lambda device: FakeStream(self, "copies"))
        monkeypatch.setattr(
            torch.cuda, "current_stream", lambda device=None: FakeStream(self, "current")
        )
        monkeypatch.setattr(torch.cuda, "Event", lambda: FakeEvent(self))
        monkeypatch.setattr(torch.cuda, "stream", lambda stream: stream)
        monkeypatch.setattr(streaming, "torch_device", lambda name: torch.device("cpu"))
        monkeypatch.setattr(streaming, "_streams", {})
        monkeypatch.setattr(streaming.virtual, "gpu", lambda name: None)


class FakeStream:
    def __init__(self, cuda, name):
        self.cuda, self.name = cuda, name

    def wait_stream(self, other):
        self.cuda.log.append((self.name, "waits for", other.name))

    def wait_event(self, event):
        assert event.on is not None, "an event that nobody has recorded orders nothing"
        self.cuda.log.append((self.name, "waits for", event.on))

    def __enter__(self):
        self.cuda.inside = self.name

    def __exit__(self, *_):
        self.cuda.log.append((self.cuda.inside, "copied"))
        self.cuda.inside = "current"


class FakeEvent:
    def __init__(self, cuda):
        self.cuda, self.on = cuda, None

    def record(self, stream):
        self.on = (stream.name, sum(e == (stream.name, "marks") for e in self.cuda.log))
        self.cuda.log.append((stream.name, "marks"))

    def synchronize(self):
        self.cuda.log.append(("host", "waits for", self.on))


def test_on_a_gpu_events_keep_the_order_of_chunks(monkeypatch):
    """Not on a card: what is queued where, and after what."""
    p = problem(40)
    packed, expected = p.pack(), p.reference()
    monkeypatch.setattr(streaming, "CHUNK_BYTES", 2 * streaming._size(packed, 0))
    cuda = FakeCuda(monkeypatch)
    real = streaming.multiply
    monkeypatch.setattr(
        streaming, "multiply", lambda *a: (cuda.log.append(("current", "computes")), real(*a))[1]
    )
    out = streaming.stream(packed, "cuda:0", "cuda", p.hidden_states, p.topk_ids, p.topk_weights)
    assert calc_diff(out, expected) < 2e-6
    log = cuda.log
    copies_ = [i for i, e in enumerate(log) if e == ("copies", "copied")]
    computes = [i for i, e in enumerate(log) if e == ("current", "computes")]
    assert len(copies_) == len(computes) == 4
    assert log[0] == ("copies", "waits for", "current") and log[-1][:2] == ("current", "waits for")
    for chunk in range(4):
        before = log[: computes[chunk]]
        assert ("current", "waits for", ("copies", chunk)) in before, "its weights are there"
        if chunk + 1 < 4:
            assert copies_[chunk + 1] < computes[chunk], "the next one is queued before"
        if chunk >= 2:
            before = log[: copies_[chunk]]
            assert ("copies", "waits for", ("current", chunk - 2)) in before, "the area is free"
            assert ("host", "waits for", ("copies", chunk - 2)) in before, "and the staging area"


class FakeDesks:
    """What a GPU asks of others, written down and computed at once."""

    def __init__(self):
        self.log = []

    def ask(self, hidden, ids, weights, experts, options):
        self.log.append("CPU asked")
        share = copies.multiply(experts, "cpu", hidden, ids, weights)
        return FakeAsked(self, lambda own: (share if own is None else share + own).bfloat16())

    def send(self, hidden, ids, weights, experts):
        self.log.append("GPU asked")
        share = copies.multiply(experts, "cuda", hidden, ids, weights)
        return FakeAsked(self, lambda: share)


class FakeAsked:
    def __init__(self, desks, answer):
        self.desks, self.answer = desks, answer

    def collect(self, *own):
        self.desks.log.append("collected")
        return self.answer(*own)


@pytest.mark.parametrize(
    ("split", "order"),
    [
        (SPLIT, ["CPU asked", "GPU asked", "own", "collected", "collected"]),
        ({"cpu": (0, 1), "cuda:0": (2, 3, 4, 5, 6, 7)}, ["CPU asked", "own", "collected"]),
        ({"cuda:1": (0, 1), "cuda:0": (2, 3, 4, 5, 6, 7)}, ["GPU asked", "own", "collected"]),
        ({"cuda:1": (0, 1), "cuda:2": (2, 3, 4, 5, 6, 7)}, ["GPU asked"] * 2 + ["collected"] * 2),
        ({"cpu": tuple(range(8))}, ["CPU asked", "collected"]),
    ],
)
def test_in_a_graph_others_are_asked_before_the_gpus_own_experts_run(split, order, monkeypatch):
    monkeypatch.delenv(virtual.COUNT)
    p = problem(6, "bf16", torch.bfloat16)
    packed = p.pack()
    parts = [PartPlan(i, d, "bf16", d.partition(":")[0], "test") for d, i in split.items()]
    made = [packed.holding({e: packed.expert(e) for e in part.ids}) for part in parts]
    experts = LayerExperts(Placement("cuda:0", tuple(parts)), made, layer=3)
    experts.desks = desks = FakeDesks()
    real = layer_module._work
    monkeypatch.setattr(layer_module, "_work", lambda *a: (desks.log.append("own"), real(*a))[1])
    with torch.inference_mode():
        out = experts._ask_cpu(p.hidden_states, p.topk_ids, p.topk_weights)
    assert out.dtype == torch.bfloat16 and calc_diff(out, p.reference()) < 3.5e-3
    assert desks.log == order


def test_the_crossover_is_measured_once_and_kept(tmp_path, monkeypatch):
    file = tmp_path / "deep" / "crossovers.json"
    monkeypatch.setenv(crossover.FILE, str(file))
    monkeypatch.setattr(crossover, "LARGEST", 64)
    packed = problem().pack()
    every = tuple(range(8))

    def made():
        part = PartPlan(every, "cpu", "fp32", "cpu", "auto")
        return build(Placement("cuda:0", (part,)), lambda *a: packed)

    experts = made()
    assert "rule of thumb" in explain({0: experts})[0]
    ((_, found),) = measure(experts)
    (entry,) = json.loads(file.read_text()).values()
    assert entry["tokens"] == found.tokens and len(entry["seconds"]["32"]) == 2
    entry["tokens"] = 5
    file.write_text(json.dumps({next(iter(json.loads(file.read_text()))): entry}))
    again = made()
    assert "from 5 tokens a call their weights are brought to cuda:0" in explain({0: again})[0]
    p = dataclasses.replace(problem(5), gate_up=problem().gate_up, down=problem().down)
    assert calc_diff(run(again, p), p.reference()) < 2e-6
    for foreign in ("{ not json", "[1, 2]", '{"a": {"tokens": true}}', '{"a": 5}', "\0\xff"):
        file.write_text(foreign)
        crossover._said.clear()
        with pytest.warns(UserWarning, match="Delete the file, or name another one"):
            assert "rule of thumb" in explain({0: made()})[0]
        with pytest.raises(ConfigError, match=r"deep/crossovers.json: expected .* Delete the file"):
            measure(experts)
        assert file.read_text() == foreign, "what is not ours is not overwritten"


@pytest.mark.parametrize(
    ("expert", "device", "sentence"),
    [(8, "cpu", "expected an expert from 0 to 7"), (-1, "cpu", "expected an expert from 0")],
)
def test_what_cannot_be_moved_is_a_sentence(expert, device, sentence):
    with pytest.raises(PlanError, match=sentence):
        layer(problem().pack()).move(expert, device)


def test_a_gpu_without_room_keeps_everything_as_it_was(monkeypatch):
    p = problem()
    experts = layer(p.pack())
    expected = run(experts, p)
    monkeypatch.setenv(virtual.MEMORY, str(virtual.gpu("cuda:0").used + 100))
    with pytest.raises(torch.OutOfMemoryError, match=r"cuda:0 \(virtual\)"):
        experts.move(7, "cuda:0")
    assert experts.part_of(7).device == "cpu" and torch.equal(run(experts, p), expected)


def test_out_of_memory_at_load_goes_to_the_cpu_if_it_may(monkeypatch):
    p = problem()
    packed = p.pack()
    part = PartPlan(tuple(range(8)), "cuda:1", "fp32", "cuda", "auto")
    monkeypatch.setenv(virtual.MEMORY, str(virtual.gpu("cuda:1").used + 3 * packed.expert_bytes(0)))
    with pytest.raises(PlanError, match=r"cuda:1 has no room for its 8 experts: .* bytes are need"):
        build(Placement("cpu", (part,)), lambda *a: packed)
    fetch = lambda ids, format, device: packed.holding({e: packed.expert(e) for e in ids})  # noqa: E731
    with pytest.warns(UserWarning, match="of them stay on the CPU"):
        experts = build(Placement("cpu", (part,)), fetch, options=RunOptions(out_of_memory="cpu"))
    assert [len(part.packed.here()) for part in experts.parts] == [2, 6]
    assert calc_diff(run(experts, p), p.reference()) < 2e-6


def test_out_of_memory_while_running_gives_experts_back(monkeypatch):
    """Plain PyTorch on the GPU: it allocates while it runs."""
    p = problem()
    for allowed in ("error", "cpu"):
        split = {"cuda:1": (2, 5), "cpu": (0, 1, 3, 4, 6, 7)}
        parts = tuple(PartPlan(i, d, "fp32", "torch", "test") for d, i in split.items())
        made = spread(p.pack(), [(part.ids, part.device) for part in parts])
        options = RunOptions(out_of_memory=allowed)
        experts = LayerExperts(Placement("cuda:0", parts), made, layer=3, options=options)
        real, gpu = copies._plain, experts.part_of(2).packed

        def full(packed, *arguments, gpu=gpu, real=real):
            if packed is gpu and gpu.here():
                raise torch.OutOfMemoryError("no room for 4096 bytes.")
            return real(packed, *arguments)

        monkeypatch.setattr(copies, "_plain", full)
        if allowed == "error":
            with pytest.raises(
                DeviceError, match=r"cuda:1 ran out of memory: no room for 4096 byt"
            ):
                run(experts, p)
        else:
            with pytest.warns(UserWarning, match="are back on the CPU"):
                out = run(experts, p)
            assert calc_diff(out, p.reference()) < 2e-6
            assert {part.device for part in experts.parts} == {"cpu"}
        monkeypatch.setattr(copies, "_plain", real)


def test_out_of_memory_for_weights_that_are_brought_leaves_them_on_the_cpu(monkeypatch):
    prefill = Prefill("cuda:1", "cuda", "r:1")
    p = problem(8)
    split = {"cpu": tuple(range(8))}
    for allowed in ("error", "cpu"):
        experts = layer(p.pack(), split, prefill=prefill, prefill_tokens=8, out_of_memory=allowed)
        monkeypatch.setenv(virtual.MEMORY, str(virtual.gpu("cuda:1").used + 100))
        if allowed == "error":
            with pytest.raises(DeviceError, match=r"ran out of memory: cuda:1 \(virtual\)"):
                run(experts, p)
        else:
            with pytest.warns(UserWarning, match="cuda:1 ran out of memory for weights that are"):
                out = run(experts, p)
            assert calc_diff(out, p.reference()) < 2e-6
            assert calc_diff(run(experts, p), p.reference()) < 2e-6  # and silently from then on
        monkeypatch.delenv(virtual.MEMORY)
