# SPDX-License-Identifier: Apache-2.0
"""`expertyard plan` of quantised files says what loading them will do: formats and bytes."""

import json
import warnings

import pytest

pytest.importorskip("transformers")

import torch

import checkpoint_writers as writers
import expertyard as ey
from expertyard.cli import main
from expertyard.hf.pack import pack
from expertyard.hf.state import promise_of
from hf_families import save, tiny_model
from test_from_pretrained import SIZES, quantised


def planned(capsys, *words):
    capsys.readouterr()
    assert main(["plan", *map(str, words), "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def parts(layers):
    return [
        (
            layer["bytes"],
            layer["dense_format"],
            [(group["format"], group["bytes"]) for group in layer.get("experts", ())],
        )
        for layer in layers
    ]


def loaded(source, **options):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return ey.from_pretrained(source, dtype=torch.bfloat16, **options)


@pytest.mark.parametrize("dense", [False, True])
@pytest.mark.parametrize("layout", ["fp8", "mxfp4", "awq", "gptq", "compressed-tensors"])
def test_a_plan_is_that_of_loading(tmp_path, capsys, layout, dense):
    if layout == "mxfp4" and dense:
        pytest.skip("mxfp4 has experts only")
    folder, _ = quantised(tmp_path, layout, dense=dense)
    for source in (folder, pack(folder, tmp_path / "packed").folder):
        model = loaded(source)
        expected = promise_of(model).plan.to_json()
        got = planned(capsys, source)
        assert parts(got["layers"]) == parts(expected["layers"])
        formats = {group["format"] for layer in got["layers"] for group in layer.get("experts", ())}
        assert formats == {writers.FORMATS[layout]}


def test_a_saved_plan_keeps_what_the_files_have(tmp_path, capsys):
    folder, _ = quantised(tmp_path, "awq")
    planned(capsys, folder, "--save", tmp_path / "plan.json")
    model = loaded(folder, plan=str(tmp_path / "plan.json"))
    assert {row.format for row in ey.verify(model).layers} == {"int4-g128-asym"}


def test_other_formats_may_be_named(tmp_path, capsys):
    folder, _ = quantised(tmp_path, "awq", dense=True)
    got = planned(capsys, folder, "--format", "int8", "--dense-format", "fp32")
    layer = got["layers"][-1]
    assert (layer["dense_format"], layer["experts"][0]["format"]) == ("fp32", "int8")
    both = planned(capsys, folder, "--what-if", "--format int8")
    what_if = both["what_if"]["layers"][-1]
    assert both["layers"][-1]["experts"][0]["format"] == "int4-g128-asym"
    assert (what_if["dense_format"], what_if["experts"][0]["format"]) == ("int4-g128-asym", "int8")


def test_a_gguf_file(tmp_path, capsys):
    pytest.importorskip("gguf")
    from gguf_writers import write_qwen3_moe

    sizes = {"hidden_size": 256, "moe_intermediate_size": 256, "head_dim": 64}
    model = tiny_model("qwen3_moe", mlp_only_layers=[], norm_topk_prob=True, **sizes)
    for kind, format in (("Q8_0", "int8-g32"), ("Q4_K", "int4-g32-asym"), ("BF16", "bf16")):
        path = tmp_path / f"{kind}.gguf"
        write_qwen3_moe(model, path, kind)
        got = planned(capsys, path)
        assert parts(got["layers"]) == parts(promise_of(loaded(path)).plan.to_json()["layers"])
        assert {layer["experts"][0]["format"] for layer in got["layers"]} == {format}


def test_plain_folders_are_planned_without_pytorch(tmp_path, capsys, monkeypatch):
    folder = save(tiny_model("qwen3_moe", torch.bfloat16, **SIZES), tmp_path)
    monkeypatch.setattr("expertyard.cli.run.import_hf", lambda **options: pytest.fail("imported"))
    assert planned(capsys, folder)["layers"][-1]["experts"][0]["format"] == "bf16"


def test_a_model_that_transformers_does_not_know_is_planned_by_its_headers(tmp_path, capsys):
    folder, _ = quantised(tmp_path, "fp8")
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "brand_new", "architectures": ["BrandNewForCausalLM"]}
    (folder / "config.json").write_text(json.dumps(config))
    assert main(["plan", str(folder), "--json"]) == 0
    out, err = capsys.readouterr()
    assert "planned by its files' headers" in err and "brand_new" in err
    assert json.loads(out)["layers"]


@pytest.mark.parametrize("content", [b"", b"GGUF", b"no such thing"])
def test_damaged_gguf_files_are_a_sentence(tmp_path, capsys, content):
    (tmp_path / "x.gguf").write_bytes(content)
    assert main(["plan", str(tmp_path / "x.gguf")]) == 2
    assert "x.gguf" in capsys.readouterr().err
