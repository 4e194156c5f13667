# SPDX-License-Identifier: Apache-2.0
"""expertyard.from_pretrained() loads quantised checkpoints as they are: same numbers, same text."""

import pytest

pytest.importorskip("transformers")

import torch

import checkpoint_writers as writers
import expertyard as ey
from expertyard.errors import ConfigError, LoadError
from expertyard.modes import default_mode
from expertyard.native import _C
from hf_families import greedy, load, logits, prompts, save, tiny_model

# sizes that groups of 128 and words of eight codes allow
SIZES = {"hidden_size": 256, "intermediate_size": 128, "head_dim": 64}
LAYOUTS = list(writers.FORMATS)


def quantised(tmp_path, layout, family=None, dense=False, dtype=torch.float32, **sizes):
    family = family or ("gpt_oss" if layout == "mxfp4" else "qwen3_moe")
    own = {**SIZES, **sizes}
    if family in ("qwen3_moe", "deepseek_v3", "glm4_moe"):
        own["moe_intermediate_size"] = 128
    if family == "deepseek_v3":
        del own["head_dim"]
    plain = save(tiny_model(family, dtype, **own), tmp_path / "plain")
    truth = writers.requantise(plain, tmp_path / layout, layout, dense)
    return tmp_path / layout, truth


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_computes_what_its_numbers_say(tmp_path, layout):
    folder, truth = quantised(tmp_path, layout)
    batch = prompts()
    reference = load(truth, experts_implementation="eager")
    model = ey.from_pretrained(folder, dtype=torch.float32, mode="exact")
    report = ey.verify(model)
    assert {row.format for row in report.layers} == {writers.FORMATS[layout]}
    torch.testing.assert_close(logits(model, batch), logits(reference, batch), rtol=1e-4, atol=1e-4)
    assert torch.equal(greedy(model, batch), greedy(reference, batch))


@pytest.mark.parametrize("layout", [name for name in LAYOUTS if name != "mxfp4"])
def test_quantised_layers_that_are_no_experts_can_be_made_plain(tmp_path, layout):
    folder, truth = quantised(tmp_path, layout, dense=True)
    model = ey.from_pretrained(folder, dtype=torch.float32, mode="exact", dense="plain")
    reference = load(truth)
    for name, parameter in reference.named_parameters():
        if ".experts." not in name:
            assert torch.equal(model.get_parameter(name), parameter), name
    batch = prompts()
    torch.testing.assert_close(logits(model, batch), logits(reference, batch), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", ["mixtral", "deepseek_v3", "glm4_moe", "olmoe"])
def test_other_families(tmp_path, family):
    folder, truth = quantised(tmp_path, "compressed-tensors", family)
    batch = prompts()
    model = ey.from_pretrained(folder, dtype=torch.float32, mode="exact")
    expected = logits(load(truth), batch)
    torch.testing.assert_close(logits(model, batch), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("format", ["bf16", "int8", "int4-g32"])
def test_another_format_may_be_asked_for(tmp_path, format):
    folder, truth = quantised(tmp_path, "fp8")
    model = ey.from_pretrained(folder, dtype=torch.float32, format=format)
    assert {row.format for row in ey.verify(model).layers} == {format}
    batch = prompts()
    difference = logits(model, batch) - logits(load(truth), batch)
    assert difference.square().mean().sqrt() < {"bf16": 0.01, "int8": 0.02, "int4-g32": 0.3}[format]


def test_the_dense_part_has_the_dtype_of_the_config(tmp_path):
    folder, _ = quantised(tmp_path, "fp8", dense=True)
    model = ey.from_pretrained(folder, dtype=torch.bfloat16)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert model.config.name_or_path == str(folder)


def test_hf_computes_the_same_from_the_same_files(tmp_path):
    """transformers' own loading of the fp8 checkpoint, which it dequantises without a GPU."""
    folder, _ = quantised(tmp_path, "fp8", dense=True, dtype=torch.bfloat16)
    theirs = load(folder, torch.bfloat16)
    batch = prompts()
    ours = ey.from_pretrained(folder, dtype=torch.bfloat16)
    difference = logits(ours, batch) - logits(theirs, batch)
    assert difference.abs().median() < 0.02


def test_hf_computes_the_same_from_the_same_mxfp4(tmp_path):
    folder, _ = quantised(tmp_path, "mxfp4")
    theirs = load(folder, torch.bfloat16)
    batch = prompts()
    ours = ey.from_pretrained(folder, dtype=torch.bfloat16)
    difference = logits(ours, batch) - logits(theirs, batch)
    assert difference.abs().median() < 0.02


def test_plain_folders_load_as_with_transformers(tmp_path):
    folder = save(tiny_model("qwen3_moe", torch.bfloat16), tmp_path / "plain")
    model = ey.from_pretrained(folder)
    assert {row.format for row in ey.verify(model).layers} == {"bf16"}
    other = load(folder, torch.bfloat16, quantization_config=ey.ExpertsConfig())
    batch = prompts()
    assert torch.equal(logits(model, batch), logits(other, batch))


@pytest.mark.parametrize("search", [False, True])
def test_plain_weights_are_quantised_while_they_stream(tmp_path, search):
    folder = save(tiny_model("qwen3_moe", torch.bfloat16, **SIZES), tmp_path / "plain")
    model = ey.from_pretrained(folder, format="int4-g32", search=search, dtype=torch.float32)
    assert {row.format for row in ey.verify(model).layers} == {"int4-g32"}
    batch = prompts()
    exact = logits(load(folder), batch)
    error = (logits(model, batch) - exact).square().mean().sqrt()
    assert 0 < error < 0.3


def test_road_c_quantises_too():
    model = tiny_model("qwen3_moe", **SIZES)
    batch = prompts()
    exact = logits(model, batch)
    ey.attach(model, ey.ExpertsConfig(format="int8"))
    assert {row.format for row in ey.verify(model).layers} == {"int8"}
    error = (logits(model, batch) - exact).square().mean().sqrt()
    assert 0 < error < 0.05
    ey.detach(model)
    assert torch.equal(logits(model, batch), exact)


def test_generation_settings_come_along(tmp_path):
    folder, _ = quantised(tmp_path, "fp8")
    (folder / "generation_config.json").write_text('{"temperature": 0.25, "do_sample": true}')
    assert ey.from_pretrained(folder).generation_config.temperature == 0.25


@pytest.mark.parametrize(
    ("keywords", "words"),
    [
        ({"quantization_config": {"quant_method": "fp8"}}, "expected an ExpertsConfig, got dict"),
        ({"quantization_config": ..., "format": "int4"}, "give format to the ExpertsConfig"),
    ],
)
def test_keywords_that_make_no_sense(tmp_path, keywords, words):
    if keywords["quantization_config"] is ...:
        keywords = {**keywords, "quantization_config": ey.ExpertsConfig()}
    with pytest.raises(ConfigError, match=words):
        ey.from_pretrained(tmp_path, **keywords)


def test_no_folder_is_a_sentence(tmp_path):
    with pytest.raises(LoadError, match="no such file or folder"):
        ey.from_pretrained(tmp_path / "nothing")
    with pytest.raises(LoadError, match=r"there is no config\.json in it"):
        ey.from_pretrained(tmp_path)


def test_saving_is_refused_with_the_way_to_do_it(tmp_path):
    folder, _ = quantised(tmp_path, "fp8")
    model = ey.from_pretrained(folder)
    with pytest.raises(ConfigError, match=r"expertyard pack PATH -o OUT .* expertyard\.attach"):
        model.save_pretrained(tmp_path / "out")
    assert not list((tmp_path / "out").glob("*.safetensors"))


@pytest.mark.parametrize("options", [{}, {"format": "int4-g32"}], ids=str)
def test_an_attached_model_saves_what_it_was_before(tmp_path, options):
    """Quantised or not: its parameters are the model's own."""
    model = tiny_model("qwen3_moe", torch.bfloat16, **SIZES)
    expected = {name: value.clone() for name, value in model.state_dict().items()}
    ey.attach(model, ey.ExpertsConfig(**options))
    again = load(save(model, tmp_path / "saved"), torch.bfloat16)
    assert again.state_dict().keys() == expected.keys()
    for name, value in again.state_dict().items():
        assert torch.equal(value, expected[name]), name
    ours = ey.from_pretrained(tmp_path / "saved", **options)
    # torch's own bf16 products depend on where weights lie in memory
    torch.testing.assert_close(logits(ours, prompts()), logits(model, prompts()), rtol=0, atol=0.1)
    assert [row.format for row in ey.verify(ours).layers] == [
        row.format for row in ey.verify(model).layers
    ]


def test_a_model_by_experts_implementation_saves_as_ever(tmp_path):
    folder = save(tiny_model("qwen3_moe", torch.bfloat16, **SIZES), tmp_path / "plain")
    model = load(folder, torch.bfloat16, experts_implementation="expertyard")
    again = load(save(model, tmp_path / "saved"), torch.bfloat16)
    for name, value in again.state_dict().items():
        assert torch.equal(value, model.state_dict()[name]), name


def test_quantised_layers_that_are_made_plain_are_said(tmp_path):
    folder, _ = quantised(tmp_path, "fp8", dense=True)
    with pytest.warns(UserWarning, match=r"quantised layers that are no experts \(.*made plain in"):
        ey.from_pretrained(folder, dense="plain")


def test_activations_are_rounded_where_perplexity_allows_it_and_the_cpu_gains(tmp_path):
    folder, _ = quantised(tmp_path, "int8")
    batch = prompts()
    by_mode = {
        mode: logits(ey.from_pretrained(folder, dtype=torch.float32, mode=mode), batch)
        for mode in ("auto", "exact", "fast")
    }
    assert not torch.equal(by_mode["exact"], by_mode["fast"])
    chosen = default_mode("int8")
    assert torch.equal(by_mode["auto"], by_mode[chosen])
    vnni = any(k["runnable"] and k["isa"] == "avx512_vnni" for k in _C.kernels())
    assert chosen == ("fast" if vnni and _C.forced_isa() in (None, "avx512_vnni") else "exact")
