# SPDX-License-Identifier: Apache-2.0
"""-ot, --cpu-moe and --n-cpu-moe mean what they mean in llama.cpp, less its documented bugs."""

from typing import Any

import pytest

from expertyard.cli.plan import main
from expertyard.errors import PlanError, RuleError
from expertyard.rules.override_tensor import split_parts
from plan_helpers import codes, homes, plan, whole


@pytest.mark.parametrize(
    "value",
    [
        "exps=CPU",
        r"\.ffn_.*_exps\.=CPU",
        r"blk\..*\.ffn_(gate|up|down)_exps\.weight=CPU",
        r"([0-9]+).ffn_.*_exps.=CPU",
        r".ffn_(up|down|gate)_exps.=CPU",
        [r"ffn_up_exps=CPU,ffn_gate_exps=CPU", "ffn_down_exps=CPU"],
        "exps=CPU,",
    ],
)
def test_all_experts_on_the_cpu_the_rest_on_the_gpu(value: Any) -> None:
    made = plan("DeepSeek-V3", override_tensor=value)
    assert homes(made) == ["cuda:0"] * 61
    assert {whole(made, i) for i in range(3, 61)} == {"cpu"}
    assert codes(made) == []


def test_the_first_override_wins() -> None:
    made = plan("Qwen3-30B-A3B", override_tensor=r"blk\.[0-4]\.ffn_.*_exps=CUDA0,exps=CPU")
    assert [whole(made, i) for i in range(6)] == ["cuda:0"] * 5 + ["cpu"]
    late = plan("Qwen3-30B-A3B", override_tensor=["exps=CPU", r"blk\.[0-4]\.ffn_.*_exps=CUDA0"])
    assert {whole(late, i) for i in range(48)} == {"cpu"}
    (found,) = late.findings
    assert found.code == "shadowed-rule" and "exps=CPU comes first" in found.message


def test_several_gpus_take_their_layers_along() -> None:
    value = (
        r"blk\.([0-9]|1[0-9])\.ffn_.*_exps=CUDA0, blk\.(2[0-9])\.ffn_.*_exps=CUDA1, "
        r"ffn_.*_exps=CPU"
    )
    made = plan("Qwen3-30B-A3B", override_tensor=value)
    assert [whole(made, i) for i in (0, 19, 20, 29, 30, 47)] == [
        "cuda:0", "cuda:0", "cuda:1", "cuda:1", "cpu", "cpu",
    ]  # fmt: skip
    assert homes(made)[20:30] == ["cuda:1"] * 10


def test_whole_blocks_move_with_their_attention() -> None:
    made = plan("Mixtral-8x7B", override_tensor=r"blk\.(3[01])\.=CPU,blk\.=CUDA1,token_embd=CPU")
    assert homes(made) == ["cuda:1"] * 30 + ["cpu"] * 2
    assert whole(made, 31) == "cpu" and whole(made, 29) == "cuda:1"
    assert made.modules["model.embed_tokens"] == "cpu"


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        (r"blk\.\d{1,2}\.ffn=CPU", [r"blk\.\d{1,2}\.ffn=CPU"]),
        (r"blk\.(?=1).*exps=CPU, a=CUDA0", [r"blk\.(?=1).*exps=CPU", "a=CUDA0"]),
        (r"[0,1]=CPU,b=CPU", ["[0,1]=CPU", "b=CPU"]),
        (r"a\(,b=CPU", [r"a\(,b=CPU"]),
        (" a = CPU ,, b=CPU,", ["a = CPU", "b=CPU"]),
    ],
)
def test_parts_are_split_as_people_mean_them(text: str, parts: list[str]) -> None:
    assert split_parts(text) == parts


def test_a_lookahead_and_a_bounded_repeat_work() -> None:
    made = plan("Qwen3-30B-A3B", override_tensor=r"blk\.\d{1}\.ffn_(?=up|gate|down).*exps=CPU")
    assert [whole(made, i) for i in (9, 10)] == ["cpu", "cuda:0"]


def test_cpu_moe_and_n_cpu_moe() -> None:
    assert {whole(plan("OLMoE", cpu_moe=True), i) for i in range(16)} == {"cpu"}
    made = plan("OLMoE", n_cpu_moe=5)
    assert [whole(made, i) for i in range(16)] == ["cpu"] * 5 + ["cuda:0"] * 11
    assert made.layers[0].experts[0].why == "--n-cpu-moe 5"  # type: ignore[index]
    more = plan("OLMoE", n_cpu_moe=999)
    assert {whole(more, i) for i in range(16)} == {"cpu"} and codes(more) == ["clamped"]
    assert {whole(plan("OLMoE", n_cpu_moe=0), i) for i in range(16)} == {"cuda:0"}


def test_n_cpu_moe_counts_blocks_with_the_dense_ones() -> None:
    made = plan("DeepSeek-V3", n_cpu_moe=5)
    assert [whole(made, i) for i in range(3, 7)] == ["cpu", "cpu", "cuda:0", "cuda:0"]


def test_an_override_before_n_cpu_moe_has_priority(capsys: pytest.CaptureFixture[str]) -> None:
    import json

    def devices(*args: str) -> list[str]:
        assert main(["OLMoE", *args, "--json"]) == 0
        layers = json.loads(capsys.readouterr().out)["layers"]
        return [layer["experts"][0]["device"] for layer in layers[:3]]

    own = ("-ot", r"blk\.1\.ffn_.*_exps=CUDA0")
    assert devices(*own, "--n-cpu-moe", "3") == ["cpu", "cuda:0", "cpu"]
    assert devices("--n-cpu-moe", "3", *own) == ["cpu", "cpu", "cpu"]
    assert devices("--cpu-moe") == ["cpu", "cpu", "cpu"]


def test_layers_go_with_their_experts_unless_someone_says_otherwise() -> None:
    value = r"blk\.[3-5]\.ffn_.*_exps=CUDA1"
    made = plan("OLMoE", override_tensor=[value, "exps=CPU"])
    assert homes(made)[2:7] == ["cuda:0", "cuda:1", "cuda:1", "cuda:1", "cuda:0"]
    made = plan("OLMoE", override_tensor=value, layers="0:16")
    assert homes(made) == ["cuda:0"] * 16
    assert [whole(made, i) for i in (2, 3, 6)] == ["cuda:0", "cuda:1", "cuda:0"]


def test_one_tensor_of_the_attention_does_not_move_the_layer() -> None:
    made = plan("DeepSeek-V3", override_tensor="exps=CPU,attn_kv_b=CPU")
    assert homes(made) == ["cuda:0"] * 61 and codes(made) == ["split-layer"]
    assert homes(plan("DeepSeek-V3", override_tensor="attn=CPU")) == ["cpu"] * 61


@pytest.mark.parametrize(
    "model", ["DeepSeek-V3", "gpt-oss-120b", "Qwen3-30B-A3B", "Qwen1.5-MoE-A2.7B"]
)
def test_every_tensor_has_a_name_that_patterns_find(model: str) -> None:
    names = {
        "DeepSeek-V3": ["exp_probs_b", "attn_q_a_norm", "attn_kv_a_norm", "attn_kv_b", "shexp"],
        "gpt-oss-120b": ["attn_sinks", "ffn_down_exps.bias", "attn_q.bias"],
        "Qwen3-30B-A3B": ["attn_q_norm", "attn_k_norm", "ffn_gate_inp", "token_embd"],
        "Qwen1.5-MoE-A2.7B": ["ffn_gate_inp_shexp", "ffn_up_shexp"],
    }[model]
    for name in names:
        assert "dead-rule" not in codes(plan(model, override_tensor=f"{name}=CUDA0")), name


@pytest.mark.parametrize("target", ["CUDA_Host", "CPU", "cpu", "CPU_REPACK", "ROCm_Host"])
def test_host_buffers_are_the_cpu(target: str) -> None:
    assert whole(plan("OLMoE", override_tensor=f"exps={target}"), 3) == "cpu"


def test_torn_experts_stay_in_one_piece_and_are_reported() -> None:
    made = plan("OLMoE", override_tensor=r"blk\.3\.ffn_up_exps=CPU")
    assert whole(made, 3) == "cpu"
    assert codes(made) == ["split-experts"]


def test_a_pattern_that_matches_nothing_is_reported() -> None:
    made = plan("OLMoE", override_tensor=r"exps=CPU,blk\.99\.ffn_up_exps=CUDA0,mlp\.experts=CPU")
    dead = [f.message for f in made.findings if f.code == "dead-rule"]
    assert len(dead) == 2 and r"blk\.99" in dead[0] and "GGUF" in dead[1]


def test_with_memory_the_rest_is_solved() -> None:
    made = plan("Qwen3-30B-A3B", n_cpu_moe=10, memory="cuda:0=24GiB,cpu=64GiB")
    assert {whole(made, i) for i in range(10)} == {"cpu"}
    on_gpu = [
        len(g.ids) for i in range(10, 48) for g in made.layers[i].experts or () if g.device != "cpu"
    ]
    assert sum(on_gpu) * 9 * 2**20 > 20 * 2**30


@pytest.mark.parametrize(
    ("value", "said"),
    [
        ("exps", "expected REGEX=DEVICE"),
        ("=CPU", "expected REGEX=DEVICE"),
        ("(=CPU", "regular expression"),
        ("exps=GPUX", "'GPUX' is no device"),
        ("", "nothing"),
        (5, "got 5"),
        ([1], "list"),
        ("exps=CUDA99999", "no device"),
    ],
)
def test_wrong_text_is_quoted(value: Any, said: str) -> None:
    with pytest.raises(RuleError, match=said):
        plan("OLMoE", override_tensor=value)


@pytest.mark.parametrize("value", [-1, "x", 1.5, ""])
def test_a_wrong_n_cpu_moe_is_an_error(value: Any) -> None:
    with pytest.raises(RuleError, match="--n-cpu-moe"):
        plan("OLMoE", n_cpu_moe=value)


def test_a_device_without_memory_is_named() -> None:
    with pytest.raises(PlanError, match=r"cuda:1 is named by -ot exps=CUDA1"):
        plan("OLMoE", override_tensor="exps=CUDA1", memory="cuda:0=24GiB,cpu=64GiB")


def test_two_inputs_that_contradict_are_both_named() -> None:
    with pytest.raises(PlanError, match=r"--layers 0:16 puts it on cuda:0, -ot blk.* on cpu"):
        plan("OLMoE", layers=16, override_tensor=r"blk\.3\.=CPU")


def test_inputs_that_do_not_contradict_work_together() -> None:
    made = plan("OLMoE", layers="0:8;1:8", cpu_moe=True)
    assert homes(made) == ["cuda:0"] * 8 + ["cuda:1"] * 8
    assert {whole(made, i) for i in range(16)} == {"cpu"}
