# SPDX-License-Identifier: Apache-2.0
"""mistral.rs topologies: ranges (higher end wins), regexes (last wins), regex beats range."""

from pathlib import Path
from typing import Any

import pytest

from expertyard.errors import RuleError
from plan_helpers import codes, homes, plan, whole


def test_ranges_do_not_include_their_end() -> None:
    made = plan(
        "Mixtral-8x7B",
        topology="0-4:\n  device: cuda[0]\n4-8:\n  device: cuda[1]\n8-32:\n  device: cpu\n",
    )
    assert homes(made) == ["cuda:0"] * 4 + ["cuda:1"] * 4 + ["cpu"] * 24
    assert whole(made, 5) == "cuda:1"
    assert made.layers[5].why == "topology:3"


def test_a_bare_number_is_one_layer() -> None:
    made = plan("Mixtral-8x7B", topology="3:\n  device: cpu\n0-32:\n  device: cuda[0]\n")
    assert homes(made)[3] == "cuda:0"  # the range's end is higher
    made = plan("Mixtral-8x7B", topology="31:\n  device: cpu\n0-31:\n  device: cuda[0]\n")
    assert homes(made)[30:] == ["cuda:0", "cpu"]


def test_the_higher_end_wins_and_on_a_tie_the_later() -> None:
    made = plan("Mixtral-8x7B", topology="0-32:\n  device: cuda[0]\n0-16:\n  device: cpu\n")
    assert homes(made) == ["cuda:0"] * 32
    assert "shadowed-rule" in codes(made)
    made = plan("Mixtral-8x7B", topology="0-32:\n  device: cuda[0]\n16-32:\n  device: cpu\n")
    assert homes(made) == ["cuda:0"] * 16 + ["cpu"] * 16


def test_a_regex_beats_every_range_and_the_last_regex_wins() -> None:
    text = r"""
'/layers\.[0-3]\.mlp\.experts/':
  device: cpu
'/layers\.3\.mlp\.experts/':
  device: cuda[1]
0-48:
  device: cuda[0]
"""
    made = plan("Qwen3-30B-A3B", topology=text)
    assert homes(made) == ["cuda:0"] * 48
    assert [whole(made, i) for i in range(5)] == ["cpu", "cpu", "cpu", "cuda:1", "cuda:0"]


def test_a_regex_moves_single_experts() -> None:
    text = "'/layers\\.2\\.mlp\\.experts\\.(1|5)\\./':\n  device: cpu\n"
    made = plan("Qwen3-30B-A3B", topology=text)
    groups = {g.device: g.ids for g in made.layers[2].experts or ()}
    assert groups["cpu"] == (1, 5) and len(groups["cuda:0"]) == 126


def test_layers_beyond_the_last_range_are_planned_and_said() -> None:
    made = plan("Mixtral-8x7B", topology="0-8:\n  device: cuda[1]\n")
    assert homes(made)[:8] == ["cuda:1"] * 8 and made.num_layers == 32
    assert codes(made) == ["short-range"]


def test_a_range_beyond_the_model_is_cut_and_said() -> None:
    made = plan("Mixtral-8x7B", topology="0-64:\n  device: cpu\n")
    assert homes(made) == ["cpu"] * 32 and codes(made) == ["clamped"]
    assert "dead-rule" in codes(plan("Mixtral-8x7B", topology="40-64:\n  device: cpu\n"))


def test_idle_regexes_are_dead_or_shadowed() -> None:
    text = "'/experts\\.3\\./':\n  device: cpu\n'/experts/':\n  device: cpu\n"
    assert codes(plan("Mixtral-8x7B", topology=text)) == ["shadowed-rule"]
    assert codes(plan("Mixtral-8x7B", topology="'/expert9/':\n  device: cpu\n")) == ["dead-rule"]


def test_a_gap_between_ranges_is_planned_and_said() -> None:
    made = plan("Mixtral-8x7B", topology="0-8:\n  device: cuda[0]\n12-32:\n  device: cpu\n")
    assert homes(made) == ["cuda:0"] * 12 + ["cpu"] * 20
    (found,) = made.findings
    assert found.code == "uncovered-module" and "8-11" in found.message


def test_what_isq_leaves_alone_is_said() -> None:
    made = plan("Mixtral-8x7B", topology="0-32:\n  isq: Q4K\n  device: cuda[0]\n")
    (found,) = made.findings
    assert (found.severity, found.code) == ("note", "foreign-rule")
    assert "routed experts only" in found.message


def test_isq_is_the_nearest_format_of_the_experts() -> None:
    made = plan("Mixtral-8x7B", topology="0-16:\n  isq: Q4K\n16-32:\n  isq: Q8_0\n  device: cpu\n")
    formats = [{g.format for g in layer.experts or ()} for layer in made.layers]
    assert formats == [{"int4"}] * 16 + [{"int8"}] * 16
    assert homes(made) == ["cuda:0"] * 16 + ["cpu"] * 16
    assert made.devices["cpu"].experts < 1.1 * 16 * 8 * 176_160_768


def test_a_file_and_its_lines(tmp_path: Path) -> None:
    path = tmp_path / "t.yml"
    path.write_text("0-4:\n  isq: Q3K\n  device: cuda[0]\n  devise: cpu\n")
    made = plan("Mixtral-8x7B", topology=str(path))
    assert made.layers[0].why == "t.yml:1"
    (found,) = [f for f in made.findings if f.code == "unknown-key"]
    assert (found.line, found.severity) == (4, "error")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("4-4:\n  device: cpu\n", "above its start"),
        ("8-4:\n  device: cpu\n", "above its start"),
        ("0-4:\n  device: gpu[x]\n", "expected cpu"),
        ("0-4:\n  isq: Q9K\n", "Q9K"),
        ("'/(/':\n  device: cpu\n", "regular expression"),
        ("a-b:\n  device: cpu\n", "START-END"),
        ("- 0-4\n", "expected a map"),
        ("0-4: cpu\n", "expected isq and device"),
        ("{}\n", "no ranges"),
        ("0-4:\n  device: cpu\n0-4:\n  device: cpu\n", "twice"),
        ("a: [\n", "not YAML"),
    ],
)
def test_wrong_topologies_are_explained(text: str, said: str) -> None:
    with pytest.raises(RuleError, match=said):
        plan("Mixtral-8x7B", topology=text)


def test_a_dict_is_a_topology_too() -> None:
    value: dict[Any, Any] = {"0-16": {"device": "cuda:0"}, 20: {"device": "cpu"}}
    assert homes(plan("Mixtral-8x7B", topology=value))[20] == "cpu"
