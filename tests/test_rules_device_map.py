# SPDX-License-Identifier: Apache-2.0
"""accelerate's device_map: the most specific name wins, every weight must be covered."""

import json
from pathlib import Path
from typing import Any

import pytest

from expertyard.errors import RuleError
from plan_helpers import codes, experts, homes, plan, whole

TWO = {"model.embed_tokens": 0, "model.norm": 1, "lm_head": 1, "model.layers": 0}


def test_the_most_specific_name_wins() -> None:
    table = {
        **TWO,
        "model.layers.20": 1,
        "model.layers.3.mlp.experts": "cpu",
        "model.layers.4.mlp.experts.5": "cuda:1",
        "model.layers.4.mlp": "cpu",
    }
    made = plan("Mixtral-8x7B", device_map=table)
    assert homes(made) == ["cuda:0"] * 20 + ["cuda:1"] + ["cuda:0"] * 11
    assert [whole(made, i) for i in (2, 3, 20)] == ["cuda:0", "cpu", "cuda:1"]
    assert experts(made, 4) == {"cuda:1": [5], "cpu": [0, 1, 2, 3, 4, 6, 7]}
    assert made.modules == {
        "model.embed_tokens": "cuda:0", "model.norm": "cuda:1", "lm_head": "cuda:1",
    }  # fmt: skip


def test_the_empty_name_is_the_whole_model() -> None:
    made = plan("Mixtral-8x7B", device_map={"": "cpu"})
    assert set(homes(made)) == {"cpu"} and set(made.modules.values()) == {"cpu"}
    made = plan("Mixtral-8x7B", device_map="cuda:1")
    assert set(homes(made)) == {"cuda:1"}


def test_auto_is_the_planner() -> None:
    made = plan("OLMoE", device_map="auto", memory="cuda:0=24GiB,cpu=64GiB")
    assert set(homes(made)) == {"cuda:0"} and whole(made, 3) == "cuda:0"
    assert made == plan("OLMoE", memory="cuda:0=24GiB,cpu=64GiB")


def test_max_memory_keys() -> None:
    made = plan("OLMoE", device_map="auto", memory={0: "4GiB", "cpu": "64GiB"})
    assert made.devices["cuda:0"].capacity == 4 << 30


def test_a_file(tmp_path: Path) -> None:
    path = tmp_path / "map.json"
    path.write_text(json.dumps(TWO))
    made = plan("Mixtral-8x7B", device_map=str(path))
    assert made.layers[0].why == "map.json 'model.layers'"


def test_names_of_the_checkpoint_are_known_too() -> None:
    table = {**TWO, "model.layers.3.block_sparse_moe.experts": "cpu"}
    assert whole(plan("Mixtral-8x7B", device_map=table), 3) == "cpu"


def test_disk_is_the_cpu_with_the_file_mapped() -> None:
    assert set(homes(plan("OLMoE", device_map={"": "disk"}))) == {"cpu"}


def test_a_name_that_is_no_module_gets_the_nearest() -> None:
    made = plan("OLMoE", device_map={"": 0, "model.layers.3.mlp.expert": "cpu"})
    (found,) = made.findings
    assert found.code == "unknown-key" and "model.layers.3.mlp.experts" in found.message


def test_parts_that_leave_their_layer_are_reported() -> None:
    made = plan("OLMoE", device_map={"": 0, "model.layers.3.self_attn.q_norm": "cpu"})
    assert codes(made) == ["split-layer"] and set(homes(made)) == {"cuda:0"}


@pytest.mark.parametrize(
    ("value", "said"),
    [
        ({"model.layers": 0}, "no device for model.embed_tokens"),
        ({"": -1}, "-1"),
        ({"": "gpux"}, "gpux"),
        ({}, "nothing"),
        ({"": None}, "None"),
        ({0: "cpu"}, "module names"),
        ("no.json", "no such file"),
        ("autoo", "Did you mean 'auto'"),
        (["cpu"], "expected a dict"),
        (True, "expected a dict"),
    ],
)
def test_wrong_maps_are_explained(value: Any, said: str) -> None:
    with pytest.raises(RuleError, match=said):
        plan("OLMoE", device_map=value)


@pytest.mark.parametrize("text", ["[1]", "{", '"x"', '{"": 0, "": 1}', "\x00"])
def test_a_file_that_is_no_map(tmp_path: Path, text: str) -> None:
    path = tmp_path / "map.json"
    path.write_text(text)
    with pytest.raises(RuleError, match=r"map\.json"):
        plan("OLMoE", device_map=str(path))


def test_single_experts_by_their_projections() -> None:
    """Checkpoint names go down to w1, w2, w3; an expert stays in one piece."""
    name = "model.layers.3.block_sparse_moe.experts.4"
    every = {f"{name}.{part}": 1 for part in ("w1", "w2", "w3")}
    made = plan("Mixtral-8x7B", device_map={"": 0, **every})
    assert experts(made, 3)["cuda:1"] == [4] and codes(made) == []
    torn = plan("Mixtral-8x7B", device_map={"": 0, f"{name}.w1": "cpu"})
    assert experts(torn, 3)["cpu"] == [4] and codes(torn) == ["split-experts"]


def test_fused_parameters_stay_in_one_piece() -> None:
    name = "model.layers.3.mlp.experts"
    both = {f"{name}.gate_up_proj": 1, f"{name}.down_proj": 1}
    made = plan("OLMoE", device_map={"": 0, **both})
    assert whole(made, 3) == "cuda:1" and codes(made) == []
    torn = plan("OLMoE", device_map={"": 0, f"{name}.gate_up_proj": 1, f"{name}.down_proj": "cpu"})
    assert whole(torn, 3) == "cpu" and codes(torn) == ["split-experts"]


def test_a_torch_device_is_a_device() -> None:
    torch = pytest.importorskip("torch")
    assert homes(plan("OLMoE", device_map={"": torch.device("cuda", 1)})) == ["cuda:1"] * 16
    assert homes(plan("OLMoE", device_map=torch.device("cpu"))) == ["cpu"] * 16


def test_names_of_older_multimodal_checkpoints() -> None:
    older = {"language_model.model": 0, "language_model.lm_head": 0, "vision_model": 1,
             "multi_modal_projector": 1, "language_model.model.layers.5": "cpu"}  # fmt: skip
    made = plan("Llama-4-Scout", device_map=older)
    assert homes(made)[4:7] == ["cuda:0", "cpu", "cuda:0"] and codes(made) == []
    assert made.modules["model.visual"] == "cuda:1"
