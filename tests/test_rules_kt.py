# SPDX-License-Identifier: Apache-2.0
"""KTransformers rules as people have them: whole files, and every planted mistake found."""

from pathlib import Path
from typing import Any

import pytest

from expertyard import ModelSpec, Request, make_plan
from expertyard.errors import PlanError, RuleError
from expertyard.plan import Finding, Plan
from plan_helpers import codes, experts, homes, whole

V3 = ModelSpec.from_family("DeepSeek-V3")
MIXTRAL = ModelSpec.from_family("Mixtral-8x7B")
OP = "ktransformers.operators"
MODELING = "ktransformers.models.modeling_deepseek_v3"


def rule(
    name: str = "", cls: str = "", new: str = "default", recursive: bool = True, **kwargs: Any
) -> dict[str, Any]:
    match = {key: value for key, value in (("name", name), ("class", cls)) if value}
    made: dict[str, Any] = {"match": match, "replace": {"class": new, "kwargs": kwargs}}
    return made if recursive else {**made, "recursive": False}


def on(device: str, **more: Any) -> dict[str, Any]:
    return {"generate_device": device, "prefill_device": device, **more}


def experts_rule(layers: str, out: str, path: str = "mlp.experts", **more: Any) -> dict[str, Any]:
    kwargs = {
        "prefill_device": out, "prefill_op": "KExpertsTorch", "generate_device": "cpu",
        "generate_op": "KExpertsCPU", "out_device": out, **more,
    }  # fmt: skip
    return rule(
        rf"^model\.layers\.{layers}\.{path}$", new=f"{OP}.experts.KTransformersExperts",
        recursive=False, **kwargs,
    )  # fmt: skip


LOW, HIGH = "(0|[1-9]|[12][0-9])", "([345][0-9]|60)"


def two_gpus() -> list[dict[str, Any]]:
    """The shape of the multi-GPU files that people start from: everything twice."""
    rules = [rule(r"^model.embed_tokens", **on("cpu"))]
    for layers, gpu in ((LOW, "cuda:0"), (HIGH, "cuda:1")):
        rules.append(
            rule(
                rf"^model\.layers\.{layers}\.",
                f"{MODELING}.DeepseekV3RotaryEmbedding",
                f"{OP}.RoPE.YarnRotaryEmbeddingV3",
                **on(gpu),
            )
        )
    for layers, gpu in ((LOW, "cuda:0"), (HIGH, "cuda:1")):
        rules.append(
            rule(
                rf"^model\.layers\.{layers}\.(?!self_attn\.kv_b_proj).*$",
                "torch.nn.Linear",
                f"{OP}.linear.KTransformersLinear",
                **on(gpu, generate_op="KLinearMarlin", prefill_op="KLinearTorch"),
            )
        )
    for layers, gpu in ((LOW, "cuda:0"), (HIGH, "cuda:1")):
        rules.append(
            rule(
                rf"^model\.layers\.{layers}\.mlp$",
                f"{MODELING}.DeepseekV3MoE",
                f"{OP}.experts.KDeepseekV3MoE",
                **on(gpu),
            )
        )
    for layers, gpu in ((LOW, "cuda:0"), (HIGH, "cuda:1")):
        rules.append(
            rule(
                rf"^model\.layers\.{layers}\.mlp\.gate$",
                f"{MODELING}.MoEGate",
                f"{OP}.gate.KMoEGate",
                **on(gpu),
            )
        )
    rules += [experts_rule(LOW, "cuda:0"), experts_rule(HIGH, "cuda:1")]
    for layers, gpu in ((LOW, "cuda:0"), (HIGH, "cuda:1")):
        rules.append(
            rule(
                rf"^model\.layers\.{layers}\.self_attn$",
                "",
                f"{OP}.attention.KDeepseekV2Attention",
                **on(gpu, absorb_for_prefill=False),
            )
        )
    rules.append(
        rule(
            "^model$",
            "",
            f"{OP}.models.KDeepseekV2Model",
            per_layer_prefill_intput_threshold=0,
            transfer_map={30: "cuda:1"},
        )
    )
    rules.append(rule(rf"^model\.layers\.{LOW}\.", **on("cuda:0")))
    rules.append(
        rule(
            r"^lm_head$",
            "torch.nn.Linear",
            f"{OP}.linear.KTransformersLinear",
            **on("cuda:1", generate_op="VLinearMarlin", prefill_op="KLinearTorch"),
        )
    )
    rules.append(rule(rf"(^model\.layers\.{HIGH}\.)|(^model\.norm)", **on("cuda:1")))
    return rules


def plan(rules: Any, spec: ModelSpec = V3, **more: Any) -> Plan:
    return make_plan(spec, Request(rules=rules, **more))


def only(made: Plan, code: str) -> Finding:
    (found,) = [f for f in made.findings if f.code == code]
    return found


def test_a_whole_multi_gpu_file() -> None:
    made = plan(two_gpus())
    assert homes(made) == ["cuda:0"] * 30 + ["cuda:1"] * 31
    assert made.transfers == {30: "cuda:1"}
    for layer in made.layers[3:]:
        (group,) = layer.experts or ()
        assert (group.device, group.op, group.prefill_op) == ("cpu", "cpu", "torch")
        assert group.out_device == layer.device
    assert made.modules == {
        "model.embed_tokens": "cpu", "model.norm": "cuda:1", "lm_head": "cuda:1",
    }  # fmt: skip
    assert codes(made, "error", "warning") == []
    assert set(codes(made)) == {"foreign-rule"}


def test_no_transfer_map_is_derived() -> None:
    rules = [r for r in two_gpus() if "transfer_map" not in r["replace"]["kwargs"]]
    assert plan(rules).transfers == {30: "cuda:1"}


def test_mixtral_rules_written_for_block_sparse_moe() -> None:
    made = plan([experts_rule(".*", "cuda:0", "block_sparse_moe.experts")], MIXTRAL)
    assert {whole(made, i) for i in range(32)} == {"cpu"}
    assert codes(made, "error", "warning") == []


@pytest.mark.parametrize(("layout", "ids"), [("mlp", (2, 5)), ("block_sparse_moe", (2, 5))])
def test_single_experts_in_either_layout(layout: str, ids: tuple[int, ...]) -> None:
    """Experts as modules (3.w1) or as one fused parameter: the same rules place them."""
    rules = [
        rule(rf"layers\.3\.{layout}\.experts\.(2|5)$", **on("cuda:1")),
        rule(rf"layers\.4\.{layout}\.experts\.7\.w1$", "torch.nn.Linear", **on("cuda:1")),
        rule(rf"\.{layout}\.experts$", **on("cpu")),
    ]
    made = plan(rules, MIXTRAL)
    assert experts(made, 3) == {"cuda:1": [2, 5], "cpu": [0, 1, 3, 4, 6, 7]}
    assert experts(made, 4)["cuda:1"] == [7]
    assert whole(made, 5) == "cpu"


def test_recursive_false_hides_what_is_below() -> None:
    rules = [experts_rule(".*", "cuda:0", "mlp.experts"), rule(r"experts\.3$", **on("cuda:1"))]
    made = plan(rules, MIXTRAL)
    assert whole(made, 3) == "cpu"
    found = only(made, "shadowed-rule")
    assert "recursive: False" in found.message and "rule 1" in found.message


def test_class_and_name_must_both_hold() -> None:
    rules = [
        rule("self_attn", "torch.nn.Linear", **on("cuda:1")),
        rule("self_attn$", **on("cuda:2")),
    ]
    made = plan(rules, MIXTRAL)
    assert set(homes(made)) == {"cuda:2"}
    assert "split-layer" in codes(made)


def test_bare_cuda_is_cuda_0_and_npu_is_a_device() -> None:
    assert set(homes(plan([rule(r"self_attn$", **on("cuda"))], MIXTRAL))) == {"cuda:0"}
    made = plan([rule(r"^model\.layers\.", **on("npu")), rule("experts$", **on("npu:0"))], MIXTRAL)
    assert set(homes(made)) == {"npu:0"} and made.layers[0].experts[0].op == "torch"  # type: ignore[index]


@pytest.mark.parametrize(
    ("op", "ours"),
    [
        ("KExpertsCPU", "cpu"), ("KSFTExpertsCPU", "cpu"), ("KExpertsMarlin", "cuda"),
        ("MLPCUDAExperts", "cuda"), ("KExpertsTorch", "torch"), ("None", "cpu"), (None, "cpu"),
    ],
)  # fmt: skip
def test_operators_are_ours(op: Any, ours: str) -> None:
    device = "cuda:0" if ours == "cuda" else "cpu"
    made = plan([experts_rule(".*", "cuda:0", generate_op=op, generate_device=device)])
    group = (made.layers[5].experts or ())[0]
    assert (group.op, group.device) == (ours, device)
    assert codes(made, "error") == []


def test_all_known_kwargs_are_known() -> None:
    kwargs = {
        "backend": "AMXInt8", "n_deferred_experts": [4], "num_bits": 4, "dump_enable": False,
        "dump_dir": "x", "device": "xpu", "absorb_for_prefill": False,
        "per_layer_prefill_intput_threshold": 0,
    }  # fmt: skip
    assert "unknown-key" not in codes(plan([rule("self_attn$", **kwargs)]))


PLANTED = {
    "dead-rule": (rule(r"^model\.layer\.3\.", **on("cpu")), "no module of that name"),
    "dead-rule class": (
        rule("", "ktransformers.models.modeling_qwen2_moe.Qwen2MoeSparseMoeBlock", **on("cpu")),
        "no module of class Qwen2MoeSparseMoeBlock",
    ),
    "dead-rule both": (rule(r"\.mlp$", "torch.nn.Linear", **on("cpu")), "have other classes"),
    "shadowed-rule": (experts_rule("([4-8])", "cuda:0"), "already takes layers 3-29"),
    "unknown-key": (rule("self_attn$", generate_devise="cpu"), "generate_device"),
    "unknown-op": (experts_rule("99", "cuda:0", generate_op="KExpertCPU"), "KExpertsCPU"),
    "unknown-class": (rule("self_attn$", new="x.KDeepseekV2Atention"), "KDeepseekV2Attention"),
    "unknown-class match": (rule("", "x.DeepseekV3MoEE", **on("cpu")), "DeepseekV3MoE"),
}


@pytest.mark.parametrize("name", PLANTED)
def test_a_planted_rule_is_found_with_its_line(name: str, tmp_path: Path) -> None:
    import yaml

    wrong, said = PLANTED[name]
    text = "".join(yaml.safe_dump([r], sort_keys=False) for r in two_gpus())
    line = text.count("\n") + 1
    path = tmp_path / "rules.yaml"
    path.write_text(text + yaml.safe_dump([wrong], sort_keys=False))
    found = [f for f in plan(path).findings if f.code == name.split()[0]]
    assert any(said in f.message and f.file == str(path) and f.line >= line for f in found)


def without(rules: list[dict[str, Any]], text: str) -> list[dict[str, Any]]:
    return [r for r in rules if text not in str(r["match"])]


def test_short_ranges() -> None:
    rules = two_gpus()
    for r in rules:
        if "name" in r["match"]:
            r["match"]["name"] = r["match"]["name"].replace("|60)", ")")
    found = only(plan(rules), "short-range")
    assert "stop at layer 59" in found.message and "61 layers" in found.message
    for part in ("self_attn", "experts", "router", "shared experts", "norms"):
        assert part in found.message


def test_a_gap_in_the_middle() -> None:
    rules = two_gpus()
    for r in rules:
        if "experts$" in str(r["match"]):
            r["match"]["name"] = r["match"]["name"].replace("[345][0-9]", "[45][0-9]")
    rules[-1]["match"]["name"] = r"^model\.norm"  # the catch-all would cover them
    rules.append(rule(r"^model\.layers\.([3-6][0-9])\.(?!mlp\.experts)", **on("cuda:1")))
    found = only(plan(rules), "uncovered-module")
    assert "experts of layers 30-39" in found.message


def test_a_catch_all_does_not_hide_that_the_experts_were_forgotten() -> None:
    """Real files end with a rule for everything in a layer; without it, experts need their own."""
    made = plan([r for r in two_gpus() if "experts$" not in str(r["match"])])
    found = only(made, "uncovered-module")
    assert "no rule places experts" in found.message and "not about experts" in found.message
    assert [whole(made, i) for i in (3, 60)] == ["cuda:0", "cuda:1"]


def test_a_catch_all_does_not_hide_a_short_range_of_experts() -> None:
    rules = two_gpus()
    for r in rules:
        if "experts$" in str(r["match"]):
            r["match"]["name"] = r["match"]["name"].replace("|60)", ")")
    made = plan(rules)
    found = only(made, "short-range")
    assert "experts of layers 60" in found.message and "takes them to cuda:1" in found.message


@pytest.mark.parametrize("after", [rule(r"^model\.layers\.", **on("cuda:0")), None])
def test_linear_rules_do_not_move_experts_that_a_wrapper_computes(after: Any) -> None:
    """`recursive: False` forgotten: what is below the wrapper is not what computes the experts."""
    linear = rule(r"^model\.layers\.", "torch.nn.Linear", f"{OP}.linear.KTransformersLinear",
                  **on("cuda:0"))  # fmt: skip
    wrapper = {k: v for k, v in experts_rule(".*", "cuda:0").items() if k != "recursive"}
    made = plan([r for r in (linear, wrapper, after) if r])
    assert whole(made, 5) == "cpu"
    single = rule(r"\.experts\.(3|7)$", **on("cuda:1"))
    assert experts(plan([single, linear, wrapper]), 5)["cuda:1"] == [3, 7]


def test_experts_wrappers_of_every_family_are_ours() -> None:
    """KGlm4Experts, KLlama4Experts ...: the operator counts, also of a wrapper that is unknown."""
    llama = experts_rule(".*", "cuda", "feed_forward.experts", prefill_op="None")
    llama["replace"]["class"] = f"{OP}.experts.KLlama4Experts"
    made = plan([llama], ModelSpec.from_family("Llama-4-Scout"))
    assert codes(made, "error", "warning") == [] and whole(made, 5) == "cpu"
    made = plan([rule(r"mlp\.experts$", new="x.KNewExperts", generate_op="KExpertsCPU")])
    assert codes(made, "error", "warning") == ["unknown-class"] and whole(made, 5) == "cpu"


def test_classes_of_an_unknown_family_are_not_called_wrong() -> None:
    """SmallThinker's own files: names are found in the usual layout, classes cannot be judged."""
    config = {"model_type": "smallthinker", "num_hidden_layers": 4, "hidden_size": 64,
              "num_attention_heads": 4, "moe_ffn_hidden_size": 32, "moe_num_primary_experts": 8,
              "moe_num_active_primary_experts": 2, "vocab_size": 96}  # fmt: skip
    rules = [
        rule(r"\.block_sparse_moe$", "x.modeling_smallthinker.SmallthinkerMoeBlock", **on("cuda")),
        experts_rule(".*", "cuda", "block_sparse_moe.experts"),
    ]
    made = plan(rules, ModelSpec.from_config(config, "small"))
    assert {whole(made, i) for i in range(4)} == {"cpu"}
    assert codes(made, "error", "warning") == ["unknown-family"]


def test_forgotten_modules_with_several_gpus() -> None:
    rules = [r for r in two_gpus() if "lm_head" not in str(r) and "embed" not in str(r)]
    rules[-1]["match"]["name"] = rules[-1]["match"]["name"].replace("|(^model\\.norm)", "")
    found = only(plan(rules), "uncovered-module")
    for name in ("model.embed_tokens", "lm_head", "model.norm"):
        assert name in found.message


def test_no_rule_for_experts_at_all() -> None:
    found = only(plan([rule("self_attn$", **on("cuda:0"))]), "uncovered-module")
    assert "experts" in found.message


def test_transfer_map_that_disagrees() -> None:
    rules = two_gpus()
    next(r for r in rules if "transfer_map" in str(r))["replace"]["kwargs"]["transfer_map"] = {
        28: "cuda:1"
    }
    made = plan(rules)
    assert "layers 28-29" in only(made, "transfer-map-mismatch").message
    assert made.transfers == {30: "cuda:1"}


def test_transfer_map_beyond_the_model() -> None:
    rules = two_gpus()
    moves = {30: "cuda:1", 61: "cuda:0"}
    next(r for r in rules if "transfer_map" in str(r))["replace"]["kwargs"]["transfer_map"] = moves
    assert "61" in only(plan(rules), "transfer-map-mismatch").message


def test_out_device_that_disagrees() -> None:
    rules = two_gpus()
    next(r for r in rules if "[345]" in str(r["match"]) and "experts$" in str(r["match"]))[
        "replace"
    ]["kwargs"]["out_device"] = "cuda:0"
    made = plan(rules)
    assert "layers 30-60" in only(made, "out-device-mismatch").message
    assert (made.layers[40].experts or ())[0].out_device == "cuda:1"


def test_a_device_that_does_not_go_with_its_operator() -> None:
    made = plan([experts_rule(".*", "cuda:0", generate_device="cuda:0", generate_op="KExpertsCPU")])
    found = only(made, "op-device-mismatch")
    assert found.severity == "error" and "KExpertsCPU" in found.message


def test_errors_stop_what_would_run_the_plan() -> None:
    made = plan([rule("self_attn$", generate_devise="cpu")])
    with pytest.raises(RuleError, match="generate_devise"):
        made.check()
    assert plan(two_gpus()).check() is not None


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("a: [b\n", "not YAML"),
        ("a: b\n", "expected a list of rules"),
        ("- a\n", "rule 1: expected a mapping"),
        ("- replace:\n    class: default\n", "'match' is missing"),
        ("- match:\n    name: x\n", "'replace' is missing"),
        ("- match: {}\n  replace: {class: default}\n", "got neither"),
        ("- match:\n    name: '('\n  replace: {class: default}\n", ":2: rule 1: match.name: '\\('"),
        ("- match:\n    name: 5\n  replace: {class: default}\n", "got 5"),
        (
            "- match: {name: x}\n  replace:\n    kwargs:\n      out_device: gpu1x\n",
            ":4: rule 1: out_device",
        ),
        ("- match: {name: x}\n  replace: {}\n  recursive: maybe\n", "True or False"),
        ("- match: {name: x}\n  match: {name: y}\n  replace: {}\n", "twice"),
        ("- match: {name: x}\n  replace: {kwargs: {transfer_map: 3}}\n", "transfer_map"),
        ("- match: {name: x}\n  replace: {kwargs: {transfer_map: {a: cuda}}}\n", "layer number"),
        ("- match: {name: x}\n  replace: {kwargs: {transfer_map: {3: x}}}\n", "device for layer 3"),
        ("\t- x\n  y\n", "not YAML"),
        ("- !!python/object:os.system x\n", "not YAML"),
        ("- match: {name: x}\n  replace: {kwargs: {format: int5}}\n", "int4"),
        ("# nothing: here\n", "no rules"),
    ],
)
def test_wrong_files_are_explained_with_the_line(text: str, said: str, tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    path.write_text(text)
    with pytest.raises(RuleError, match=said) as caught:
        plan(path)
    assert str(caught.value).startswith(str(path))


def test_files_that_are_no_text(tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    path.write_bytes(b"\xff\xfe\x00\x80")
    with pytest.raises(RuleError, match=r"r\.yaml"):
        plan(path)
    with pytest.raises(RuleError, match="no such file"):
        plan("nowhere.yaml")


def test_a_gpu_that_is_not_there_is_named_with_the_rule(tmp_path: Path) -> None:
    with pytest.raises(PlanError, match=r"cuda:1 is named by rules:\d+"):
        plan(two_gpus(), memory="cuda:0=80GiB,cpu=2TiB")
