# SPDX-License-Identifier: Apache-2.0
"""Per-expert placement: numbers, shares, ids; strategies; profiles; a trace replayed."""

import json
import random
from pathlib import Path
from typing import Any

import pytest

from expertyard.errors import ConfigError, PlanError, RuleError
from expertyard.plan import Plan
from expertyard.rules.replay import replay
from plan_helpers import codes, experts, plan

LAYERS, EXPERTS = 16, 64  # OLMoE


def on_gpu(made: Plan) -> list[int]:
    return [len(experts(made, i).get("cuda:0", ())) for i in range(LAYERS)]


@pytest.mark.parametrize(
    ("value", "number"),
    [
        (8, 8),
        ("8", 8),
        (0.25, 16),
        ("0.25", 16),
        ("25%", 16),
        ("1.0", 64),
        (1, 1),
        (0, 0),
        ("0", 0),
        (64, 64),
    ],
)
def test_numbers_and_shares(value: Any, number: int) -> None:
    made = plan("OLMoE", gpu_experts=value)
    assert on_gpu(made) == [number] * LAYERS
    assert codes(made) == []


@pytest.mark.parametrize("value", ["0-3,9", [0, 1, 2, 3, 9], (9, 3, 2, 1, 0, 0)])
def test_ids(value: Any) -> None:
    made = plan("OLMoE", gpu_experts=value)
    assert experts(made, 5)["cuda:0"] == [0, 1, 2, 3, 9]


def test_a_map_of_layers() -> None:
    made = plan("OLMoE", gpu_experts={2: [7], "3": "0-1", 4: 3, 5: 0.5})
    assert on_gpu(made) == [0, 0, 1, 2, 3, 32] + [0] * 10
    assert experts(made, 2)["cuda:0"] == [7]


def test_more_than_there_are_is_clamped_and_said() -> None:
    made = plan("OLMoE", gpu_experts=100)
    assert on_gpu(made) == [EXPERTS] * LAYERS and codes(made) == ["clamped"]


def test_front_and_back_fill_whole_layers() -> None:
    assert on_gpu(plan("OLMoE", gpu_experts=8, strategy="front")) == [64, 64] + [0] * 14
    assert on_gpu(plan("OLMoE", gpu_experts=8, strategy="back")) == [0] * 14 + [64, 64]


def counts() -> list[list[int]]:
    """The last experts are read most, in the later layers more so."""
    return [[1 + e * i for e in range(EXPERTS)] for i in range(LAYERS)]


def test_frequency_takes_the_most_read_of_all_layers() -> None:
    rows = [[1] * EXPERTS for _ in range(LAYERS)]
    rows[3] = [1000 if e in (5, 6, 7) else 1 for e in range(EXPERTS)]
    made = plan("OLMoE", gpu_experts=1, strategy="frequency", profile=rows)
    assert sum(on_gpu(made)) == LAYERS
    assert set(experts(made, 3)["cuda:0"]) >= {5, 6, 7}


def test_uniform_with_a_profile_takes_the_most_read_of_each_layer() -> None:
    rows = [[1 if e != i else 9 for e in range(EXPERTS)] for i in range(LAYERS)]
    made = plan("OLMoE", gpu_experts=1, profile=rows)
    assert [experts(made, i)["cuda:0"] for i in range(LAYERS)] == [[i] for i in range(LAYERS)]


def test_the_solver_uses_the_profile() -> None:
    memory = "cuda:0=4GiB,cpu=64GiB"
    even = plan("OLMoE", memory=memory, profile=counts(), strategy="uniform")
    best = plan("OLMoE", memory=memory, profile=counts())
    assert best == plan("OLMoE", memory=memory, profile=counts(), strategy="frequency")
    assert sum(on_gpu(even)) == sum(on_gpu(best))
    assert best.seconds_per_token < even.seconds_per_token
    for i in range(LAYERS):
        ids = experts(best, i).get("cuda:0", [])
        assert ids == list(range(EXPERTS - len(ids), EXPERTS)) or i == 0
    assert on_gpu(best)[1] < on_gpu(best)[15]


def write(path: Path, text: str) -> str:
    path.write_text(text)
    return str(path)


def test_profiles_from_json_and_csv_are_the_same(tmp_path: Path) -> None:
    rows = counts()
    csv = "layer,expert,count\n" + "\n".join(
        f"{i},{e},{n}" for i, row in enumerate(rows) for e, n in enumerate(row)
    )
    sources = [
        write(tmp_path / "a.json", json.dumps(rows)),
        write(tmp_path / "b.json", json.dumps({"counts": rows})),
        write(tmp_path / "c.json", json.dumps({str(i): row for i, row in enumerate(rows)})),
        write(tmp_path / "d.csv", csv),
    ]
    plans = [plan("OLMoE", gpu_experts=4, strategy="frequency", profile=s) for s in sources]
    assert all(made == plans[0] for made in plans)


def test_rows_may_be_the_moe_layers_only() -> None:
    rows = [[e == 7 for e in range(64)] for _ in range(26)]
    rows = [[int(flag) for flag in row] for row in rows]
    made = plan("DeepSeek-V2-Lite", gpu_experts=1, profile=rows)
    assert experts(made, 1)["cuda:0"] == [7]


def trace(kind: str, tokens: int = 400) -> dict[str, Any]:
    """skewed: always the same favourites. drifting: favourites that move on, which only an LRU
    follows.
    """
    rng = random.Random(1)
    made = []
    for t in range(tokens):
        base = 0 if kind == "skewed" else (t // 20) * 8 % EXPERTS
        made.append(
            [[(base + rng.randrange(8)) % EXPERTS for _ in range(4)] for _ in range(LAYERS)]
        )
    return {"tokens": made}


def test_a_trace_says_whether_fixed_experts_or_an_lru_win() -> None:
    made = plan("OLMoE", gpu_experts=8, strategy="trace", profile=trace("drifting"))
    (found,) = [f for f in made.findings if f.code == "trace-replay"]
    assert "an LRU cache wins by" in found.message
    made = plan("OLMoE", gpu_experts=8, strategy="trace", profile=trace("skewed"))
    (found,) = [f for f in made.findings if f.code == "trace-replay"]
    assert "fixed experts serve 100.0 %" in found.message
    assert experts(made, 3)["cuda:0"] == list(range(8))


def test_replay_counts_by_hand() -> None:
    tokens = [{0: (1, 2)}, {0: (1, 3)}, {0: (4, 1)}, {0: (4, 1)}]
    found = replay(tokens, {0: 2})
    # first half: 1 is read twice, 2 and 3 once: fixed {1, 2}; the LRU holds 1 and 3
    assert (found.reads, found.static_hits, found.lru_hits) == (4, 2, 3 - 1)


def test_replay_without_slots_or_tokens() -> None:
    assert replay([{0: (1,)}] * 4, {}).static_hits == 0
    assert "too short" in replay([{0: (1,)}], {0: 4}).sentence


@pytest.mark.parametrize(
    ("request_", "said"),
    [
        ({"gpu_experts": "x"}, "number"),
        ({"gpu_experts": -1}, "number|ids"),
        ({"gpu_experts": 1.5}, "at most 1"),
        ({"gpu_experts": "0-64"}, r"out of range \[0, 64\)"),
        ({"gpu_experts": [64]}, "64 out of range"),
        ({"gpu_experts": "5-2"}, "ends before"),
        ({"gpu_experts": {99: 1}}, "99"),
        ({"gpu_experts": True}, "True"),
        ({"gpu_experts": "200%"}, "at most 1"),
        ({"profile": [[1]]}, "expected 16 rows"),
        ({"profile": [[1] * 63] * 16}, "expected 64 counts"),
        ({"profile": [[-1] * 64] * 16}, "count"),
        ({"profile": [["a"] * 64] * 16}, "count"),
        ({"profile": [[0] * 64] * 16}, "no count above 0"),
        ({"profile": "nowhere.csv"}, "no such file"),
        ({"profile": {"tokens": []}}, "tokens"),
        ({"profile": {"tokens": [[[99]] * 16]}}, "99"),
        ({"profile": 5}, "rows"),
    ],
)
def test_wrong_values_are_explained(request_: dict[str, Any], said: str) -> None:
    with pytest.raises(RuleError, match=said):
        plan("OLMoE", **request_)


@pytest.mark.parametrize(
    "text", ["a,b\n1,2\n", "layer,expert,count\n1,2\n", "layer,expert,count\nx,1,1\n", "{", ""]
)
def test_wrong_profile_files_are_named(tmp_path: Path, text: str) -> None:
    with pytest.raises(RuleError, match=r"p\.csv"):
        plan("OLMoE", profile=write(tmp_path / "p.csv", text))


def test_strategies_that_lack_something() -> None:
    with pytest.raises(ConfigError, match="needs --profile"):
        plan("OLMoE", gpu_experts=1, strategy="frequency")
    with pytest.raises(ConfigError, match="expected one of uniform"):
        plan("OLMoE", strategy="fastest")
    with pytest.raises(ConfigError, match="needs a trace"):
        plan("OLMoE", strategy="trace", profile=counts())
    with pytest.raises(PlanError, match="needs a GPU"):
        plan("OLMoE", gpu_experts=1, memory="cpu=64GiB")


def test_gpu_experts_live_on_their_layers_gpu() -> None:
    made = plan("OLMoE", gpu_experts=4, layers="0:8;1:8")
    assert set(experts(made, 3)) == {"cuda:0", "cpu"} and set(experts(made, 12)) == {
        "cuda:1",
        "cpu",
    }


def test_gpu_experts_against_cpu_moe_names_both() -> None:
    with pytest.raises(
        PlanError, match=r"--gpu-experts 4 puts it on its layer's GPU, --cpu-moe on cpu"
    ):
        plan("OLMoE", gpu_experts=4, cpu_moe=True)
