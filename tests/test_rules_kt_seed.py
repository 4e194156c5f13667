# SPDX-License-Identifier: Apache-2.0
"""The examples of KTransformers' multi-GPU page parse and mean what the page says."""

from pathlib import Path

import pytest

from expertyard import ModelSpec, Request, make_plan
from expertyard.plan import Plan

V2 = ModelSpec.from_family("DeepSeek-V2")  # the page: DeepSeekV2-Chat, 60 layers
V3 = ModelSpec.from_family("DeepSeek-V3")

EXPERTS = """
- match:
    name: "^model\\\\.layers\\\\.{layers}\\\\.mlp\\\\.experts$"
  replace:
    class: ktransformers.operators.experts.KTransformersExperts     # custom MoE Kernel
    kwargs:
      generate_device: "{device}"
      generate_op:  "{op}"
{out}  recursive: False # don't recursively inject submodules of this module
"""
LOW, HIGH = "(0|[1-9]|[12][0-9])", "([345][0-9])"


def experts(layers: str, device: str, op: str, out: str = "") -> str:
    out = f'      out_device: "{out}"\n' if out else ""
    return EXPERTS.format(layers=layers, device=device, op=op, out=out)


TRANSFER = """
- match:
    name: "^model$"
  replace:
    class: "ktransformers.operators.models.KDeepseekV2Model"
    kwargs:
      transfer_map:
        30: "cuda:1"
"""
ONE_GPU = experts(".*", "cuda:0", "MLPCUDAExperts", "cuda:0")
TWO_GPUS = experts(LOW, "cpu", "KExpertsCPU", "cuda:0") + experts(
    HIGH, "cpu", "KExpertsCPU", "cuda:1"
)
MORE_VRAM = experts("([4-8])", "cuda:0", "KExpertsMarlin") + experts(
    LOW, "cpu", "KExpertsCPU", "cuda:0"
)


def plan(text: str, tmp_path: Path, spec: ModelSpec = V2) -> Plan:
    path = tmp_path / "rules.yaml"
    path.write_text(text, encoding="utf-8")
    return make_plan(spec, Request(rules=path))


def where(made: Plan, first: int, last: int) -> set[tuple[str, str, str, str]]:
    """(layer device, experts' device, op, out_device) of a range of layers, both ends included."""
    found = set()
    for layer in made.layers[first : last + 1]:
        if layer.experts is not None:
            assert sum(len(group.ids) for group in layer.experts) == 160
            found |= {(layer.device, g.device, g.op, g.out_device) for g in layer.experts}
    return found


def test_one_gpu(tmp_path: Path) -> None:
    made = plan(ONE_GPU, tmp_path)
    assert where(made, 0, 59) == {("cuda:0", "cuda:0", "cuda", "cuda:0")}
    assert made.transfers == {}


def test_transfer_map_divides_the_layers(tmp_path: Path) -> None:
    made = plan(TRANSFER + TWO_GPUS, tmp_path)
    assert where(made, 0, 29) == {("cuda:0", "cpu", "cpu", "cuda:0")}
    assert where(made, 30, 59) == {("cuda:1", "cpu", "cpu", "cuda:1")}
    assert made.transfers == {30: "cuda:1"}


def test_transfer_map_is_derived_when_absent(tmp_path: Path) -> None:
    made = plan(TWO_GPUS, tmp_path)
    assert made.transfers == {30: "cuda:1"}
    assert where(made, 30, 59) == {("cuda:1", "cpu", "cpu", "cuda:1")}


def test_the_first_matching_rule_wins(tmp_path: Path) -> None:
    made = plan(MORE_VRAM, tmp_path)
    assert where(made, 4, 8) == {("cuda:0", "cuda:0", "cuda", "cuda:0")}
    assert where(made, 1, 3) == where(made, 9, 29) == {("cuda:0", "cpu", "cpu", "cuda:0")}
    assert not [f for f in made.findings if f.code in ("dead-rule", "shadowed-rule")]


def test_the_new_rule_after_the_old_one_never_applies(tmp_path: Path) -> None:
    text = experts(LOW, "cpu", "KExpertsCPU", "cuda:0") + experts(
        "([4-8])", "cuda:0", "KExpertsMarlin"
    )
    made = plan(text, tmp_path)
    assert where(made, 4, 8) == {("cuda:0", "cpu", "cpu", "cuda:0")}
    (found,) = [f for f in made.findings if f.code == "shadowed-rule"]
    assert found.line == 12
    assert "rule 1 (rules.yaml:2)" in found.message
    assert "layers 1-29" in found.message


def test_why_names_file_and_line(tmp_path: Path) -> None:
    layer = plan(TWO_GPUS, tmp_path).layers[35]
    assert layer.experts is not None
    assert layer.experts[0].why == "rules.yaml:12"


def test_layers_0_to_59_stop_short_of_deepseek_v3(tmp_path: Path) -> None:
    made = plan(TRANSFER + TWO_GPUS, tmp_path, V3)
    (found,) = [f for f in made.findings if f.code == "short-range"]
    assert "layer 59" in found.message and "61 layers" in found.message and "60" in found.message
    assert made.layers[60].device == "cuda:1"


def test_a_layer_of_v3_experts_in_4_bit_takes_about_6_gb(tmp_path: Path) -> None:
    assert V3.layers[10].expert_bytes("int4") * 256 == pytest.approx(6e9, rel=0.05)


def test_rules_may_be_given_as_text_or_list(tmp_path: Path) -> None:
    import yaml

    from_file = plan(TWO_GPUS, tmp_path)
    from_text = make_plan(V2, Request(rules=TWO_GPUS))
    from_list = make_plan(V2, Request(rules=yaml.safe_load(TWO_GPUS)))
    assert where(from_file, 0, 59) == where(from_text, 0, 59) == where(from_list, 0, 59)
